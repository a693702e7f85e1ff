import foolbox
import torch
from mine import picture_model
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

EPS = 0.15
fmodel = foolbox.PyTorchModel(picture_model, bounds=(0, 1), device="cpu")
attack = foolbox.attacks.LinfPGD(steps=40)
loader = DataLoader(ImageFolder("pictures", ToTensor()), batch_size=100)
clean, robust, seen = 0, 0, 0
for x, y in loader:
    _, adversarial, _ = attack(fmodel, x, y, epsilons=EPS)
    assert (adversarial - x).abs().max() <= EPS + 1e-6
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    with torch.no_grad():
        right = picture_model(x).argmax(1) == y
        still = right & (picture_model(adversarial).argmax(1) == y)
    clean, robust, seen = clean + int(right.sum()), robust + int(still.sum()), seen + len(y)
print(f"clean accuracy {clean / seen:.1%}")
print(f"robust accuracy {robust / seen:.1%}")
