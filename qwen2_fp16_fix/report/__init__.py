"""The report of a scan: one HTML page, or a picture. Needs the extra `report`."""
