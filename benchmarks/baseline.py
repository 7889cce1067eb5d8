"""The work as the reports and the course's examples do it: the other side of the rows of speed.py."""

import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torchvision import transforms

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import lab6_utils as lab  # noqa: E402


class EveryTime(torch.utils.data.Dataset):
    """As in the reports: a PNG file is read, resized and normalised each time an item is requested."""

    def __init__(self, files):
        self.folder, self.names = files.images, sorted(files.train)
        self.labels = lab.encode_labels([files.train[name] for name in self.names])
        steps = [transforms.Resize((64, 64)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
        self.transform = transforms.Compose(steps)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return self.transform(Image.open(self.folder / self.names[index]).convert("RGB")), self.labels[index]


def seconds_each(step, times, device="cpu", warm_up=1):
    """Mean seconds of `times` calls of step(i), after `warm_up` calls that do not count."""
    for i in range(warm_up):
        step(i)
    lab.wait_for(device)
    start = time.perf_counter()
    for i in range(times):
        step(warm_up + i)
    lab.wait_for(device)
    return (time.perf_counter() - start) / times


def every_epoch(loader):
    """The batches of a loader, epoch after epoch; each epoch reads them again."""
    while True:
        yield from loader


def baseline_trains(settings, files, batch, steps):
    """Images per second when training as in the reports, with the network of `settings`' preset."""
    own = lab.make_settings("full", preset=settings.preset, device=settings.device, precision="fp32")
    denoiser = lab.make_denoiser(own).train().to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.Adam(denoiser.parameters(), own.learning_rate)
    scheduler = lab.DDPMScheduler(1000, beta_schedule="linear")
    batches = every_epoch(torch.utils.data.DataLoader(EveryTime(files), batch, shuffle=True, drop_last=True))

    def step(i):
        x_0, labels = (v.to(own.device) for v in next(batches))
        eps, t = torch.randn_like(x_0), torch.randint(1000, (len(x_0),), device=own.device)
        loss = (denoiser(scheduler.add_noise(x_0, eps, t), t, labels) - eps).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return batch / seconds_each(step, steps, own.device, 2)
