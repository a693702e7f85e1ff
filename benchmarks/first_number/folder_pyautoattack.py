import torch
from mine import picture_model
from pyautoattack import AutoAttack
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

EPS = 0.15
loader = DataLoader(ImageFolder("pictures", ToTensor()), batch_size=100)
x, y = (torch.cat(part) for part in zip(*loader, strict=True))
adversary = AutoAttack(picture_model, norm="Linf", eps=EPS, version="standard", seed=0)
adversarial, _ = adversary.run_standard_evaluation(x, y)
assert (adversarial - x).abs().max() <= EPS + 1e-6
assert adversarial.min() >= 0
assert adversarial.max() <= 1
with torch.no_grad():
    clean = picture_model(x).argmax(1) == y
    robust = clean & (picture_model(adversarial).argmax(1) == y)
print(f"clean accuracy {clean.float().mean():.1%}")
print(f"robust accuracy {robust.float().mean():.1%}")
