"""DeepSpeed's engine; no other package imports deepspeed."""
