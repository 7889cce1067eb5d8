"""Networks that say which objects are in an image, and the course's scoring protocol. Notebook 05.

The evaluator is the course's ResNet-18, or ours of the same kind. The judge is another network, a DenseNet, which takes
no part in training, choosing or guiding. Stands on files, machine, labels and storage.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from lab6.files import DataFiles
from lab6.labels import OBJECTS
from lab6.machine import check_finite
from lab6.storage import WEIGHTS, from_project, sha256_of


def make_evaluator_network(name: str) -> nn.Module:
    """The network of an evaluator, with 24 sigmoid outputs: the course's ResNet-18 or, for the "judge", a DenseNet."""
    from torchvision import models

    head = lambda width: nn.Sequential(nn.Linear(width, len(OBJECTS)), nn.Sigmoid())
    if name == "judge":
        network = models.DenseNet(growth_rate=24, block_config=(6, 12, 18), num_init_features=48)
        network.classifier = head(network.classifier.in_features)
    else:
        network = models.resnet18()
        network.fc = head(network.fc.in_features)
    return network


def last_layer(network: nn.Module) -> nn.Sequential:
    """The last layer of an evaluator, a Sequential(Linear, Sigmoid)."""
    return list(network.children())[-1]


class Evaluator:
    """Says which objects are in an image, and scores images by the course's protocol.

    Attributes:
        name: "course" (its checkpoint.pth), "resnet18" (ours, the same network and protocol) or "judge".
        sha256: hash of the weights file, first 16 digits.
    """

    def __init__(self, network: nn.Module, name: str, sha256: str = "", device: str = "cpu"):
        self.network = network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.name, self.sha256, self.device = name, sha256, device

    @staticmethod
    def file_of(path: Path | str) -> Path:
        """The file at `path` (relative to the project's folder) or in that folder; raises FileNotFoundError."""
        path = from_project(path)
        file = path / "model.safetensors" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(
                f"No evaluator at {file}: name a checkpoint.pth or a folder made by train_evaluator, or choose 'auto'"
            )
        return file

    @classmethod
    def load(cls, path: Path | str, device: str = "cpu") -> Evaluator:
        """Read the course's checkpoint.pth, or a folder that `train_evaluator` wrote.

        The course's file is a pickle: it is read with weights_only=True, which runs no code from it.

        Raises:
            FileNotFoundError, ValueError: naming the file and what is wrong with it.
        """
        from safetensors import safe_open

        file, name = cls.file_of(path), "course"
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as opened:
                    name = (opened.metadata() or {}).get("reader", "resnet18")  # the key of all versions
                    state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no dict
            else:
                state = torch.load(file, map_location="cpu", weights_only=True)["model"]
            network = make_evaluator_network("resnet18" if name == "course" else name)
            network.load_state_dict(state)
        except Exception as error:
            why = (
                f"not an evaluator (a ResNet-18 with Sequential(Linear(512, 24), Sigmoid()), its state dict under "
                f"'model'; {type(error).__name__}). Get the file again, or remove it: without the course's "
                "checkpoint.pth ours is used."
            )
            if isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error):
                why = (
                    "holds more than tensors, perhaps a whole model or a program, and is not run. Save its weights "
                    'anew: torch.save({"model": model.state_dict()}, file); or remove it, and ours is used.'
                )
            raise ValueError(f"{file}: {why}") from None
        check_finite(str(file), *network.parameters())
        return cls(network, name, sha256_of(file), device)

    @classmethod
    def find(cls, files: DataFiles | None = None, device: str = "cpu") -> Evaluator:
        """The course's, in one of the files EVALUATORS where it lies with the data, else the evaluator that ships."""
        if files is not None and (file := files.evaluator):
            return cls.load(file, device)
        return cls.load(WEIGHTS / "evaluator", device)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, 64, 64) in [-1, 1] -> (B, 24) probabilities on the CPU, in batches of 256."""
        with torch.no_grad():
            return torch.cat([self.network(x.to(self.device)).float().cpu() for x in images.split(256)])

    def log_probability(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(B,) log p(labels | image), with gradients: log sigma of the objects asked for, log(1 - sigma) of the others.

        Computed from the network's outputs before the sigmoid, which rounds a sure answer to 0 or 1.
        """
        logits = self._at_last_layer(images.float())[1]
        return -F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none").sum(1)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, 64, 64) in [-1, 1] -> (B, width) the input of the last layer, on the CPU, in batches of 256."""
        with torch.no_grad():
            return torch.cat([self._at_last_layer(x.to(self.device))[0].float().cpu() for x in images.split(256)])

    def _at_last_layer(self, images):
        kept = []
        hook = last_layer(self.network)[0].register_forward_hook(
            lambda module, inputs, output: kept.extend([*inputs, output])
        )
        try:
            self.network(images)
        finally:
            hook.remove()
        return kept

    def eval(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """The course's accuracy: the share of all labels of the batch that is found (see `count_hits`)."""
        return float(count_hits(self(images), labels).sum() / labels.sum())


def count_hits(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The course's protocol: an image with k labels scores its k highest outputs against them.

    Args:
        probabilities: (B, 24); labels: (B, 24) multi-hot.

    Returns:
        (B,) number of labels found, 0 to k. The course's accuracy is their sum over the sum of k.
    """
    labels = labels.cpu()
    return (top_k(probabilities, labels) & labels.bool()).sum(-1)


def top_k(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(..., B, 24) True for the k highest outputs of an image whose (B, 24) labels ask for k objects."""
    rank = probabilities.argsort(-1, descending=True).argsort(-1)
    return rank < labels.sum(1)[:, None]
