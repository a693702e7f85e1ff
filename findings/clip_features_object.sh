#!/usr/bin/env bash
# transformers 5.24.0: CLIPModel.get_image_features and get_text_features return an object, no tensor.
#
# Up to version 4 both returned the embedding, [rows, projection_dim], and so says nearly all code that is around:
# `features = model.get_image_features(...)`, then `features / features.norm(dim=-1, keepdim=True)`. Now that raises
# AttributeError. The embedding is `pooler_output`: the projected one, whereas the `pooler_output` of the vision model
# alone, of the same name in an object of the same class, is the state before the projection, in another width. Who
# takes `answer[0]`, as the first entry of a tuple-like object, gets the states of all tokens.
#
# Exit 0 while this is so, 1 when it changed, 2 where the packages can't be installed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'transformers==5.24.0' 'torch==2.13.0' 'numpy==2.3.5' \
    || exit 2
"$work/venv/bin/python" - <<'PY'
import sys

import torch
import transformers
from transformers import CLIPConfig, CLIPModel

small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
model = CLIPModel(
    CLIPConfig(
        text_config={"vocab_size": 10, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, **small},
        vision_config={"image_size": 16, "patch_size": 8, **small},
        projection_dim=8,
    )
).eval()
pixels, ids = torch.rand(3, 3, 16, 16), torch.tensor([[1, 5, 2]])
with torch.no_grad():
    image, text = model.get_image_features(pixel_values=pixels), model.get_text_features(input_ids=ids)
    before = model.vision_model(pixel_values=pixels)
    whole = model(input_ids=ids, pixel_values=pixels)


def normed(features):
    try:
        return list((features / features.norm(dim=-1, keepdim=True)).shape)
    except AttributeError as error:
        return f"AttributeError: {error}"


seen = {
    "transformers": transformers.__version__,
    "returned": [type(image).__name__, type(text).__name__],
    "features / features.norm()": normed(image),
    "features[0]": list(image[0].shape),
    "pooler_output of get_image_features": list(image.pooler_output.shape),
    "pooler_output of the vision model": list(before.pooler_output.shape),
}
for name, value in seen.items():
    print(f"{name}: {value}")
unit = image.pooler_output / image.pooler_output.norm(dim=-1, keepdim=True)
same = (
    not isinstance(image, torch.Tensor)
    and not isinstance(text, torch.Tensor)
    and "AttributeError" in str(seen["features / features.norm()"])
    and seen["features[0]"] == [3, 5, 16]
    and seen["pooler_output of get_image_features"] == [3, 8]
    and seen["pooler_output of the vision model"] == [3, 16]
    and type(image) is type(before)
    and torch.allclose(unit, whole.image_embeds, atol=1e-6)
)
print("as described" if same else "CHANGED")
sys.exit(not same)
PY
