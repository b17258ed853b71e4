import os

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded; a name that is no folder fails at once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
