"""All query heads share one key and one value head (Shazeer 2019, arXiv:1911.02150)."""

import model

IS_LLAMA = True


class ModelConfig(model.ModelConfig):
    def __post_init__(self):
        object.__setattr__(self, "num_kv_heads", 1)
        super().__post_init__()
