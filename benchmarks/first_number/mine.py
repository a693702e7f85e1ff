"""A user's own module: a trained network, the same for pictures, and samples with their labels."""

import torch
from network import Smaller, network
from torch import nn

model = network()
model.load_state_dict(torch.load("weights.pt"))
model.eval()
picture_model = nn.Sequential(Smaller(), model).eval()
x, y = samples = torch.load("samples.pt")
