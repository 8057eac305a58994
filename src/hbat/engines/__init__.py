"""One process, DDP, FSDP2 and DeepSpeed behind one interface; what is refused."""
