"""What must stand before huggingface_hub is imported: no test reaches the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
