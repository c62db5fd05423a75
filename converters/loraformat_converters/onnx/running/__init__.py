"""What the runtime is made of: opened models, what a choice feeds, buffers that stay."""
