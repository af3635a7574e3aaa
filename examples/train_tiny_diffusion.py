"""Train the embedded models, `tiny-sd` and `tiny-dit`, from scratch on the 60,000 Fashion-MNIST training images.

    python examples/train_tiny_diffusion.py --out runs/tiny-diffusion            # everything
    python examples/train_tiny_diffusion.py --stages tiny-dit                    # one stage, e.g. on another core
    python examples/train_tiny_diffusion.py --quick --out /tmp/quick             # the same path in about a minute

Stages, in order: `vae` (AutoencoderKL), `tiny-sd` (U-Net and text encoder, epsilon prediction), `tiny-dit`
(class-conditional DiT on the latents of the same VAE), `export` (two diffusers pipeline folders in fp16, with grids of
samples). The noise, the batch and the dropped captions of a step depend on (seed, stage, step) alone, and a checkpoint
holds weights, averaged weights and both Adam moments, so that a run killed at any moment and started again ends where
an undisturbed one does. `training_log.jsonl` gets one line every `--log-every` steps.
"""

import argparse
import gzip
import json
import math
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

CLASSES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
TEMPLATES = [
    "a photo of a {}",
    "a {}",
    "a grayscale picture of a {}",
    "a small picture of a {}",
    "{}",
    "one {} for sale",
]
NULL_CLASS = 1000  # what DiTPipeline uses for guidance, so the label table has 1001 rows as in DiT-XL/2
# Stable Diffusion's schedule. The DiT uses the same, so that a timestep is the same noise level in both models.
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist


def read_fashion_mnist(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) and labels (N,) of an official split, from Debian's package or else from the Hub."""
    if DEBIAN_FOLDER.is_dir():
        prefix = {"train": "train", "test": "t10k"}[split]
        images = gzip.decompress((DEBIAN_FOLDER / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((DEBIAN_FOLDER / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
        pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
        return pixels, np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)
    from datasets import load_dataset

    table = load_dataset("zalando-datasets/fashion_mnist", split=split)
    return np.stack([np.asarray(image) for image in table["image"]]), np.asarray(table["label"])


def load_fashion_mnist(split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) in [-1, 1], resized as the feature extractor resizes 28 × 28 images, and labels (N,)."""
    pixels, labels = read_fashion_mnist(split)
    resized = np.stack([np.asarray(Image.fromarray(p).resize((32, 32), Image.Resampling.BICUBIC)) for p in pixels])
    images = torch.from_numpy(resized).float() / 127.5 - 1
    return images[:, None].expand(-1, 3, -1, -1), torch.from_numpy(labels)


def step_generator(seed: int, *names: object) -> torch.Generator:
    """A generator that depends on its arguments alone, so that a resumed step repeats its own noise."""
    return torch.Generator().manual_seed(zlib.crc32(repr((seed, *names)).encode()))


def average_weights(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
    """Exponential moving average; its decay grows from 2/11 to 0.999, so that nothing is left of the start."""
    decay = min(0.999, (1 + int(num_averaged)) / (10 + int(num_averaged)))
    torch._foreach_lerp_(averaged, current, 1 - decay)


class Stage:
    """One network in training: AdamW with a cosine schedule, averaged weights, checkpoints, a log."""

    def __init__(self, name: str, model: nn.Module, lr: float, steps: int, args: argparse.Namespace) -> None:
        self.name, self.model, self.lr, self.steps, self.args = name, model, lr, steps, args
        self.average = AveragedModel(model, multi_avg_fn=average_weights)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
        self.checkpoint = args.out / f"{name}.safetensors"
        # one entry: safetensors writes several in the order of a hash table
        settings = {"lr": lr, "steps": steps, "batch": args.batch_size, "seed": args.seed}
        self.settings = {"settings": json.dumps(settings)}
        self.step = 0
        if self.checkpoint.exists():
            self._load()

    def _load(self) -> None:
        with safe_open(self.checkpoint, "pt") as file:
            begun_with = file.metadata()
        if begun_with != self.settings:
            raise SystemExit(
                f"{self.checkpoint} was begun with {begun_with}, not with {self.settings}. Give the same options to go "
                "on with it, or another --out."
            )
        state = load_file(self.checkpoint)
        self.step = int(state["step"])
        self.model.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
        self.average.module.load_state_dict({k[8:]: v for k, v in state.items() if k.startswith("average.")})
        self.average.n_averaged.fill_(self.step)
        moments = {
            i: {
                "step": torch.tensor(float(self.step)),
                "exp_avg": state[f"exp_avg.{i}"],
                "exp_avg_sq": state[f"exp_avg_sq.{i}"],
            }
            for i, _ in enumerate(self.model.parameters())
            if f"exp_avg.{i}" in state
        }
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def _save(self) -> None:
        state = {"step": torch.tensor(self.step)}
        state |= {f"model.{k}": v for k, v in self.model.state_dict().items()}
        state |= {f"average.{k}": v for k, v in self.average.module.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"exp_avg.{i}": moments["exp_avg"], f"exp_avg_sq.{i}": moments["exp_avg_sq"]}
        temporary = self.checkpoint.with_suffix(".tmp")
        save_file({k: v.contiguous() for k, v in state.items()}, temporary, self.settings)
        temporary.replace(self.checkpoint)

    def _log(self, **values: float) -> None:
        line = {"stage": self.name, "step": self.step, **{k: round(v, 6) for k, v in values.items()}}
        with (self.args.out / "training_log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        tqdm.write(json.dumps(line))

    def run(self, loss_of_step: Callable[[int], Tensor], fixed_loss: Callable[[nn.Module], Tensor]) -> nn.Module:
        """Train to the end; `fixed_loss` sees the same images, noise and timesteps each time, on averaged weights."""
        warmup = min(500, self.steps // 10 + 1)
        losses: list[float] = []
        started, first = time.time(), self.step
        for step in tqdm(
            range(self.step, self.steps), desc=self.name, initial=self.step, total=self.steps, mininterval=5
        ):
            cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
            self.optimizer.param_groups[0]["lr"] = self.lr * cosine * min(1.0, (step + 1) / warmup)
            loss = loss_of_step(step)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.average.update_parameters(self.model)
            losses.append(loss.item())
            self.step = step + 1
            if self.step % self.args.log_every == 0 or self.step == self.steps:
                with torch.no_grad():
                    fixed = fixed_loss(self.average.module).item()
                seconds = (time.time() - started) / (self.step - first)
                self._log(loss=sum(losses) / len(losses), fixed_loss=fixed, seconds_per_step=seconds)
                losses.clear()
            if self.step % self.args.save_every == 0 or self.step == self.steps:
                self._save()
        return self.average.module


def batch_indices(seed: int, name: str, step: int, batch_size: int, count: int) -> Tensor:
    """Rows of one step: every row once an epoch, in an order that depends on (seed, epoch)."""
    per_epoch = count // batch_size
    order = torch.randperm(count, generator=step_generator(seed, name, "epoch", step // per_epoch))
    return order[(step % per_epoch) * batch_size :][:batch_size]


def train_vae(images: Tensor, args: argparse.Namespace) -> AutoencoderKL:
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=32,
    )
    stage = Stage("vae", vae, lr=2e-3, steps=args.vae_steps, args=args)

    def loss_on(model: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
        posterior = model.encode(batch).latent_dist
        reconstruction = model.decode(posterior.sample(generator)).sample
        # per latent element; small enough that reconstruction dominates, large enough for latents near unit scale
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return (reconstruction - batch).abs().mean() + 1e-3 * kl

    def loss_of_step(step: int) -> Tensor:
        rows = batch_indices(args.seed, "vae", step, 64, len(images))
        return loss_on(vae, images[rows], step_generator(args.seed, "vae", step))

    vae = stage.run(loss_of_step, lambda m: loss_on(m, images[:256], step_generator(args.seed, "vae", "fixed")))
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: Tensor, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation of every image, scaled so that the sampled latents have unit variance."""
    path = args.out / "latents.safetensors"
    if not path.exists():
        posteriors = [vae.encode(batch).latent_dist for batch in tqdm(images.split(250), desc="latents")]
        mean = torch.cat([p.mean for p in posteriors]).contiguous()
        std = torch.cat([p.std for p in posteriors]).contiguous()
        scale = 1 / (mean.var() + (std**2).mean()).sqrt()
        save_file({"mean": mean * scale, "std": std * scale, "scale": scale.clone()}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    state = load_file(path)
    vae.register_to_config(scaling_factor=float(state["scale"]))
    return state["mean"], state["std"]


def make_diffusion_loss(
    latents: tuple[Tensor, Tensor], name: str, batch_size: int, predict: Callable, args: argparse.Namespace
) -> Callable:
    """Epsilon-prediction loss ‖ε − ε_θ(√ᾱ_t z + √(1−ᾱ_t) ε, t, condition)‖² (Ho et al. 2020, eq. 14)."""
    mean, std = latents
    alphas_cumprod = DDIMScheduler(**SCHEDULE).alphas_cumprod

    def loss(model: nn.Module, step: int | str) -> Tensor:
        generator = step_generator(args.seed, name, step)
        rows = torch.arange(512) if step == "fixed" else batch_indices(args.seed, name, step, batch_size, len(mean))
        rows = rows[rows < len(mean)]
        z = mean[rows] + std[rows] * torch.randn(mean[rows].shape, generator=generator)
        noise = torch.randn(z.shape, generator=generator)
        t = torch.randint(0, 1000, (len(z),), generator=generator)
        alpha = alphas_cumprod[t].view(-1, 1, 1, 1)
        return (predict(model, alpha.sqrt() * z + (1 - alpha).sqrt() * noise, t, rows, generator) - noise).pow(2).mean()

    return loss


CAPTIONS = [template.format(c) for template in TEMPLATES for c in CLASSES]


def build_tokenizer(captions: Sequence[str] = CAPTIONS, length: int = 24) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges are learned from the captions; any other text still encodes, byte by byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        # numbered beforehand: else the order of a hash table numbers them, and that decides between equal counts
        special_tokens=[letter + "</w>" for letter in alphabet],
        show_progress=False,
    )
    bpe.train_from_iterator([caption.lower() for caption in captions], trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(merge) for merge in merges]
    vocabulary = {token: i for i, token in enumerate([*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def train_tiny_sd(
    latents: tuple[Tensor, Tensor], labels: Tensor, args: argparse.Namespace
) -> tuple[nn.ModuleDict, CLIPTokenizer]:
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 96, 144),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=(1, 2, 3, 4),  # in diffusers' U-Net config this is the number of heads
        norm_num_groups=16,
    )
    networks = nn.ModuleDict({"unet": unet, "text_encoder": build_text_encoder(tokenizer)})
    captions = ["", *(template.format(c) for c in CLASSES for template in TEMPLATES)]
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def predict(model: nn.Module, noisy: Tensor, t: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
        template = torch.randint(0, len(TEMPLATES), (len(rows),), generator=generator)
        caption = 1 + labels[rows] * len(TEMPLATES) + template
        caption[torch.rand(len(rows), generator=generator) < 0.2] = 0  # 20 % empty prompts
        states = model["text_encoder"](ids).last_hidden_state[caption]
        return model["unet"](noisy, t, states, return_dict=False)[0]

    loss = make_diffusion_loss(latents, "tiny-sd", args.batch_size, predict, args)
    stage = Stage("tiny-sd", networks, lr=1e-3, steps=args.unet_steps, args=args)
    return stage.run(lambda step: loss(networks, step), lambda m: loss(m, "fixed")), tokenizer


def train_tiny_dit(latents: tuple[Tensor, Tensor], labels: Tensor, args: argparse.Namespace) -> DiTTransformer2DModel:
    torch.manual_seed(args.seed)
    dit = DiTTransformer2DModel(
        num_attention_heads=5,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    dit.eval()  # its own label dropout draws from the global generator, one draw a block: ours is in `predict`
    for block in dit.transformer_blocks:  # adaLN-Zero: each block starts as the identity (Peebles & Xie 2023, §3.2)
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        with torch.no_grad():
            block.norm1.emb.class_embedder.embedding_table.weight.mul_(0.02)

    def predict(model: nn.Module, noisy: Tensor, t: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
        classes = labels[rows].clone()
        classes[torch.rand(len(rows), generator=generator) < 0.2] = NULL_CLASS
        return model(noisy, timestep=t, class_labels=classes, return_dict=False)[0]

    loss = make_diffusion_loss(latents, "tiny-dit", args.batch_size, predict, args)
    stage = Stage("tiny-dit", dit, lr=1e-3, steps=args.dit_steps, args=args)
    return stage.run(lambda step: loss(dit, step), lambda m: loss(m, "fixed"))


def sample_grid(draw: Callable[[int, torch.Generator], list[Image.Image]], path: Path, seed: int) -> None:
    """Ten rows, one a class, of eight samples each."""
    sheet = Image.new("RGB", (8 * 34, len(CLASSES) * 34), "white")
    for row in tqdm(range(len(CLASSES)), desc=path.name):
        for column, image in enumerate(draw(row, step_generator(seed, "samples", row))):
            sheet.paste(image, (column * 34 + 1, row * 34 + 1))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(path)


def export(
    vae: AutoencoderKL,
    sd: nn.ModuleDict,
    tokenizer: CLIPTokenizer,
    dit: DiTTransformer2DModel,
    args: argparse.Namespace,
) -> None:
    """Write both pipeline folders (fp16), then sample from what was written."""
    sd_pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=sd["text_encoder"],
        tokenizer=tokenizer,
        unet=sd["unet"],
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    sd_pipeline.to(torch.float16).save_pretrained(args.out / "tiny-sd", safe_serialization=True)
    dit_pipeline = DiTPipeline(dit, vae, DDIMScheduler(**SCHEDULE), id2label=dict(enumerate(CLASSES)))
    dit_pipeline.to(torch.float16).save_pretrained(args.out / "tiny-dit", safe_serialization=True)

    steps = 5 if args.quick else 50
    sd_pipeline = StableDiffusionPipeline.from_pretrained(args.out / "tiny-sd", dtype=torch.float32)
    dit_pipeline = DiTPipeline.from_pretrained(args.out / "tiny-dit", dtype=torch.float32)
    for pipeline in (sd_pipeline, dit_pipeline):
        pipeline.set_progress_bar_config(disable=True)
    common = {"guidance_scale": 3.0, "num_inference_steps": steps}
    sample_grid(
        lambda c, g: sd_pipeline([f"a photo of a {CLASSES[c]}"] * 8, generator=g, **common).images,
        args.out / "tiny-sd-samples.png",
        args.seed,
    )
    sample_grid(
        lambda c, g: dit_pipeline([c] * 8, generator=g, **common).images,
        args.out / "tiny-dit-samples.png",
        args.seed,
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny-diffusion"))
    parser.add_argument(
        "--stages",
        nargs="+",
        default=["vae", "tiny-sd", "tiny-dit", "export"],
        choices=["vae", "tiny-sd", "tiny-dit", "export"],
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=2000)
    parser.add_argument("--unet-steps", type=int, default=10000)
    parser.add_argument("--dit-steps", type=int, default=14000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--log-every", type=int, default=250)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="results are bit-equal for equal numbers of threads",
    )
    parser.add_argument(
        "--quick", action="store_true", help="1,000 images and a few steps: the same path, not the same models"
    )
    args = parser.parse_args()
    if args.quick:
        args.vae_steps, args.unet_steps, args.dit_steps, args.log_every, args.save_every = 12, 12, 12, 6, 6
    return args


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    images, labels = load_fashion_mnist("train")
    if args.quick:
        images, labels = images[:1000], labels[:1000]
    # A finished stage loads its checkpoint and returns at once: each run walks the whole path to the stage asked for.
    vae = train_vae(images, args)
    latents = encode_all(vae, images, args)
    if {"tiny-sd", "export"} & set(args.stages):
        sd, tokenizer = train_tiny_sd(latents, labels, args)
    if {"tiny-dit", "export"} & set(args.stages):
        dit = train_tiny_dit(latents, labels, args)
    if "export" in args.stages:
        export(vae, sd, tokenizer, dit, args)


if __name__ == "__main__":
    main()
