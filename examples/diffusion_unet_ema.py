"""A diffusion U-Net with an exponential moving average of its weights, within a budget.

    python examples/diffusion_unet_ema.py

Shows: skip connections, group norm and attention are planned as they are; the average is none of
the model's business, and is kept in checkpoints beside it.
"""

import tempfile

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import actckpt


class Denoiser(torch.nn.Module):
    """The loss of predicting the noise that was added to images."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.schedule = DDPMScheduler()
        self.unet = UNet2DModel(
            sample_size=size,
            block_out_channels=(width, 2 * width),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
        )

    def forward(self, images: torch.Tensor, noise: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        noisy = self.schedule.add_noise(images, noise, at)
        return torch.nn.functional.mse_loss(self.unet(noisy, at).sample, noise)


def main(size: int = 32, width: int = 32, steps: int = 4, share: float = 0.8) -> None:
    torch.manual_seed(0)
    model = Denoiser(size, width)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.rand(4, 3, size, size)

    def make_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return images, torch.randn_like(images), torch.randint(1000, (len(images),))

    batch = make_batch()
    untouched = actckpt.measure(model, batch, optimizer=optimizer, steps=1)
    budget_gb = share * untouched.peak_bytes / 1e9
    actckpt.optimize(model, budget_gb, batch=batch, optimizer=optimizer)
    with (
        tempfile.TemporaryDirectory() as folder,
        actckpt.Checkpointer(folder, model=model, optimizer=optimizer, ema=ema, every=2) as run,
    ):
        run.resume()
        for _ in range(steps):
            loss = model(*make_batch())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update_parameters(model)
            run.step(metrics={"loss": loss})
            print(f"loss {loss.item():.4f}")
    measured = actckpt.measure(model, batch, optimizer=optimizer, steps=1)
    print(f"peak {measured.peak_bytes / 1e6:.1f} MB of {untouched.peak_bytes / 1e6:.1f}")
    print(f"within the budget: {measured.peak_bytes <= budget_gb * 1e9}")


if __name__ == "__main__":
    main()
