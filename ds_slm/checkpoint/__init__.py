"""Named tensors on disk. Knows neither deepspeed nor the launcher."""
