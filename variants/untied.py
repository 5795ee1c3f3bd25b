"""An output matrix of its own, not the embedding's (LLaMA's way; tying them: Press and Wolf 2016, arXiv:1608.05859)."""

import model

IS_LLAMA = True


class ModelConfig(model.ModelConfig):
    def __post_init__(self):
        object.__setattr__(self, "tie_embeddings", False)
        super().__post_init__()
