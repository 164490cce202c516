"""What the fix costs: counted exactly (`cost`), and measured in pairs of stock and fixed (`cells`)."""
