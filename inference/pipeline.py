"""Pipeline: a checkpoint that is ready to sample from."""

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from common.checkpoint import weights_of
from common.dialects import open_checkpoint
from common.errors import UsageError, UserError, as_usage_error
from common.precision import set_precision
from common.recipe import Recipe, build_with, recipe_of
from common.sizes import image_size_of, latent_shape
from common.streams import SampleStreams
from data.autoencoder import to_uint8
from data.images import to_pixels
from download import locate, published_name
from models import SiT
from transport import SolverError, Transport

from .guidance import GuidedNetwork, compile_network
from .inputs import check_finite, checked_images, checked_indices, checked_labels, checked_noise
from .likelihood import log_likelihood
from .loading import check_decoding, check_told, note_on_classes, open_autoencoder, open_transport
from .settings import ODE, Guidance

UNSEEN = ("model", "num_heads", "image_size", "num_classes")  # what the shapes of a bare file do not tell, or not all


@dataclass
class Pipeline:
    """A model, how to read it and what its latents are. `Pipeline.load` makes one of a file.

    Images are uint8 (N, H, W, 3), labels are class ids, latents are (N, *latent_shape). Bad settings and files raise
    UserError, a ValueError, with one line.
    """

    path: Path
    recipe: Recipe
    model: SiT  # (x, t, y) -> output, at t = 0 noise and t = 1 data, as recipe.transport.prediction says
    transport: Transport
    autoencoder: object
    device: torch.device
    precision: str
    compile: bool = False
    decoding: dict = field(default_factory=dict)  # LatentSpace.decode's batch_size and tiling
    note: str = None  # what a person should know of how the file was read, in one line
    calls: int = 0  # of the network, by all methods
    weights: str = "ema"  # which of the checkpoint's
    _compiled: dict = field(default_factory=dict, repr=False)

    @classmethod
    def load(
        cls,
        ckpt=None,
        *,
        kind="auto",
        weights="ema",
        vae=None,
        device=None,
        precision=None,
        compile=False,
        decoding=None,
        default_vae="ema",
        default_transport=None,
        **told,
    ):
        """The pipeline of a checkpoint of train.py, or of published or other bare weights.

        ckpt: a file or folder, or published weights, or hub:REPO/FILE (None: those of model and image_size, by default the
        paper's SiT-XL/2 at 256 px). kind: whose weights they are, sit, repa, dit or auto, which raises where it cannot tell.
        weights: ema, or another state of the file: ema-0.999, model. vae: ema, mse, none (pixels), a diffusers folder or
        another pipeline's autoencoder (None: the checkpoint's, or default_vae if it does not say). device: None is a GPU, if
        there. precision: fp32, tf32 or bf16 (None: tf32 on a GPU, else fp32). decoding: batch_size, tiling.
        told: any of TOLD, which the file must not contradict; default_transport: TransportSettings where neither says.
        """
        told = check_told(told)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        precision = set_precision(precision, device)
        path = locate(ckpt or published_name(told.get("model"), told.get("image_size")))
        content = open_checkpoint(path, kind, **told)
        state = weights_of(content, path, None if weights == "ema" else weights)
        recipe = recipe_of(content, state, path, *map(told.get, UNSEEN))
        transport = open_transport(told, recipe, path, default_transport)
        autoencoder = open_autoencoder(vae or recipe.vae or default_vae, recipe, path).to(device)
        names = dict(vae=autoencoder.name, vae_hash=autoencoder.config_hash)
        size = recipe.image_size or image_size_of(recipe.model_args["input_size"], autoencoder)
        recipe = replace(recipe, transport=transport.settings, image_size=size, **names)
        if (shape := latent_shape(recipe.image_size, autoencoder, recipe.model_args["patch_size"])) != recipe.latent_shape:
            found = f"{path} was trained on {recipe.latent_shape}"
            raise UsageError(f"--vae {autoencoder.name} makes latents of {shape}, but {found}")
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        model = build_with(recipe, state, path).to(device=device, dtype=dtype).eval().requires_grad_(False)
        model.t_embedder.float()  # as in training: bfloat16 cannot tell neighbouring times apart
        more = check_decoding(decoding, autoencoder), note_on_classes(content, told, recipe, path)
        return cls(path, recipe, model, transport, autoencoder, device, precision, compile, *more, weights=weights)

    @property
    def latent_shape(self):
        return self.recipe.latent_shape

    def network(self, guidance=Guidance(), gradients=False):  # noqa: B008
        """The guided model, for any (x, t, y) -> output. Raises UsageError where this model cannot be guided so."""
        weak, compiled = guidance.weak, self.compile
        if weak is not None:
            for what in ("image_size", "num_classes", "vae_hash", "transport"):
                ours, theirs = getattr(self.recipe, what), getattr(weak.recipe, what)
                if what == "transport":
                    ours, theirs = ((s.path_type, s.prediction) for s in (ours, theirs))
                if ours != theirs:
                    raise UsageError(f"--guidance-ckpt {weak.path} has {what} {theirs}, but {self.path} has {ours}")
            compiled, weak = self.compile or weak.compile, weak._callable(gradients)
        elif guidance.scale != 1 and self.recipe.null_class is None:
            raise UsageError(
                f"--cfg-scale {guidance.scale}: {self.path} was trained without a null class, so only 1 is possible"
            )
        return GuidedNetwork(self._callable(gradients), guidance, self.recipe.null_class, weak, compiled)

    def _callable(self, gradients):
        if self.compile and self._compiled.get("gradients") is not gradients:
            compile_network(self.model, gradients)
            self._compiled["gradients"] = gradients
        return self.model

    def draw(
        self,
        labels,
        *,
        seed=0,
        solver=ODE(),  # noqa: B008
        guidance=Guidance(),  # noqa: B008
        trajectory=False,
        noise=None,
        indices=None,
        reverse=False,
        on_step=bool,
    ):
        """The states of a solve, a list of latents (N, *latent_shape) on the device, of which [-1] is the sample and the
        only one unless trajectory.

        Sample i depends on (seed, indices[i]) and its label alone, by default indices 0, 1, ... noise: latents to start
        from instead, or, with reverse, those to bring to noise. on_step(): called at every step. Raises UserError naming
        the checkpoint where the result is not finite.
        """
        y = self._labels(labels)
        streams = SampleStreams(seed, checked_indices(indices, len(y)))
        network = self.network(guidance)
        z = streams.randn(self.latent_shape, self.device)
        if noise is not None:
            z = checked_noise(noise, len(y), self.latent_shape).to(self.device)
        if reverse and not isinstance(solver, ODE):
            raise UsageError("images become noise by the ODE: give an ODE as solver")
        more = dict(trajectory=trajectory, on_step=on_step) | ({"reverse": True} if reverse else {})
        set_precision(self.precision, self.device)  # which another pipeline may have set since
        with self._naming(), streams.ahead() as randn_like:
            with as_usage_error():
                sample = solver.sampling(self, randn_like, edges=guidance.edges, **more)
            states = sample(z, network, y=y)
        self.calls += network.calls
        check_finite(states[-1], f"--ckpt {self.path}: its samples", "; its weights may be damaged or untrained")
        return states

    @torch.no_grad()
    def to_images(self, latents):
        """Latents -> uint8 images (N, H, W, 3), a tensor that is still on the device."""
        pixels = self.autoencoder.decode(latents.to(self.device).float(), **self.decoding)
        check_finite(pixels, f"--vae {self.autoencoder.name}: its pixels", f" for samples of {self.path}")
        return to_uint8(pixels)

    def to_latents(self, images):
        """uint8 images -> the mean latents that they are encoded as, on the device."""
        images = checked_images(images, self.recipe, self.autoencoder)
        mean, _ = self.autoencoder.moments(to_pixels(images.to(self.device)))
        return self.autoencoder.latents(mean, 0, 0)

    def decode(self, latents):
        """Latents -> uint8 images, a NumPy array."""
        return self.to_images(torch.as_tensor(latents)).cpu().numpy()

    def sample(self, labels, *, trajectory=False, **settings):
        """Images of these classes, a NumPy array; with trajectory the way to them, a list of such arrays, noise first.

        settings: seed, solver, guidance, noise, indices, on_step, as draw takes them.
        """
        frames = [self.decode(state) for state in self.draw(labels, trajectory=trajectory, **settings)]
        return frames if trajectory else frames[-1]

    def encode(self, images, labels=None, *, solver=ODE(), guidance=Guidance()):  # noqa: B008
        """The noise that the ODE would make these images from: latents, for draw or sample as noise."""
        latents = self.to_latents(images)
        return self.draw(self._null(labels, latents), noise=latents, solver=solver, guidance=guidance, reverse=True)[-1]

    def likelihood(
        self,
        images,
        labels=None,
        *,
        seed=0,
        solver=ODE(),  # noqa: B008
        guidance=Guidance(),  # noqa: B008
        indices=None,
        **probes,
    ):
        """(nats, bits per dimension), each (N,), of images under the model: see log_likelihood for what they mean.

        probes: num_probes, exact_divergence, dequantize. Image i's random numbers depend on (seed, indices[i]) alone.
        Raises UsageError for guidance, since a guided flow has no density that its network knows.
        """
        guidance.refuse_density()
        if not isinstance(solver, ODE):
            raise UsageError("--likelihood is that of the ODE: give an ODE as solver")
        images = checked_images(images, self.recipe, self.autoencoder)
        y = self._labels(self._null(labels, images), len(images))
        streams, network = SampleStreams(seed, checked_indices(indices, len(y))), self.network(gradients=True)
        set_precision(self.precision, self.device)
        with self._naming():
            nats, bits = log_likelihood(replace(self, model=network), images, y, streams, solver, **probes)
        self.calls += network.calls
        if not bool(nats.isfinite().all()):
            raise UserError(f"--ckpt {self.path}: its likelihoods are not finite numbers")
        return nats.numpy(), bits.numpy()

    def _null(self, labels, images):
        """Labels as they are given, or the null class for each image."""
        if labels is not None:
            return labels
        if self.recipe.null_class is None and self.recipe.num_classes > 1:
            raise UsageError(f"{self.path} was trained without a null class: give the images' labels")
        return [self.recipe.null_class or 0] * len(images)

    @contextmanager
    def _naming(self):
        """What a solver says of its failure, with the checkpoint's name."""
        try:
            yield
        except SolverError as error:
            raise UserError(f"--ckpt {self.path}: {error}") from error

    def _labels(self, labels, count=None):
        y = checked_labels(labels, count)
        self.check_classes([label for label in y.tolist() if label != self.recipe.null_class])
        return y.to(self.device)

    def check_classes(self, labels):
        """Raises UsageError for a class that the model does not know; the null class is none."""
        known = self.recipe.num_classes
        wrong = [label for label in labels if not 0 <= label < known]
        if wrong:
            raise UsageError(f"--class-labels {wrong[0]}: this model knows the classes 0 to {known - 1}")
