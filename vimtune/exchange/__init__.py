"""Adapters and models in the formats of others, and to others: HF peft, timm, the hub."""
