"""SiT as a model of diffusers: models.py, with its config beside its weights."""

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from .models import SiT
from .time_maps import TIME_MAPS


class SiTTransformer(SiT, ModelMixin, ConfigMixin):
    """model(x, t, y): x (N, C, h, w) at times t (N,), 0 being noise and 1 data, of class ids y (N,). recipe: what it is, and
    how its output is to be read."""

    @register_to_config
    def __init__(
        self,
        input_size=32,
        patch_size=2,
        in_channels=4,
        hidden_size=1152,
        depth=28,
        num_heads=16,
        mlp_ratio=4.0,
        class_dropout_prob=0.1,
        num_classes=1000,
        learn_sigma=True,
        time_map=None,
        recipe=None,
    ):
        shape = (input_size, patch_size, in_channels, hidden_size, depth, num_heads)
        super().__init__(*shape, mlp_ratio, class_dropout_prob, num_classes, learn_sigma)
        if time_map is not None:
            self.t_embedder.time_map = TIME_MAPS[time_map]()

    def forward(self, x, t, y):
        self.t_embedder.float()  # whatever it was loaded in: half precision cannot tell neighbouring times apart
        return super().forward(x, t, y)
