"""The certificate: whether any prompt can make a checkpoint overflow in float16, from its weights alone."""
