"""The verification: how far each way of running a checkpoint is from stock fp32."""
