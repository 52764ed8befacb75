"""What must stand before torch and huggingface_hub are imported."""

import os

# No test reaches the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tensors of tests are slower on several threads; and processes that tests start must make the same host fingerprint.
os.environ["OMP_NUM_THREADS"] = "1"
