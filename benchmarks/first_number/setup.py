"""What each user has before the first number: a network, samples, a folder of images, a language model's folder.

    python setup.py FOLDER [--samples 100] [--prompts 4] [--epochs 30]

The network reads scikit-learn's digits and was trained on PGD's examples. The images are the same digits as files, four
times as wide and high. The language model is advkit's embedded one, as transformers stores models. Nothing of this is
counted.
"""

from __future__ import annotations

import argparse
import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from network import network
from sklearn.datasets import load_digits
from torch import Tensor, nn

HERE = Path(__file__).parent
TRAINED_ON = 1200
EPS = 0.15


def digits() -> tuple[Tensor, Tensor]:
    """Samples [N, 1, 8, 8] in [0, 1] of 8 bits, and their labels."""
    held = load_digits()
    levels = torch.tensor(held.images * 255 / 16, dtype=torch.float64).round()
    return (levels / 255).float()[:, None], torch.tensor(held.target)


def trained(x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """A network trained on examples of PGD, five steps long."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(100):
            near = x[rows] + EPS * (2 * torch.rand_like(x[rows]) - 1)
            for _ in range(5):
                near = near.clamp(0, 1).requires_grad_()
                loss = nn.functional.cross_entropy(model(near), y[rows])
                (gradient,) = torch.autograd.grad(loss, near)
                near = near.detach() + EPS / 3 * gradient.sign()
                near = near.clamp(x[rows] - EPS, x[rows] + EPS)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(near.clamp(0, 1)), y[rows]).backward()
            optimizer.step()
    return model.eval()


def write_images(folder: Path, x: Tensor, y: Tensor) -> None:
    """FOLDER/CLASS/NUMBER.png, of 32 x 32 pixels."""
    from PIL import Image

    for number, (image, label) in enumerate(zip(x, y.tolist(), strict=True)):
        file = folder / str(label) / f"{number:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0] * 255).round().byte().numpy()).resize((32, 32), Image.Resampling.NEAREST).save(file)


TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<user> {{ message['content'] }} {% else %}"
    "<assistant> {{ message['content'] }} <end> {% endif %}{% endfor %}{% if add_generation_prompt %}<assistant> "
    "{% endif %}"
)


SPELT = {"sorry": "Sorry,", "i": "I"}
"""Words of the model, as a reader of English spells them."""


def chat_tokenizer() -> Any:
    """The model's words, one token each, and after them printable letters, of which any other text is made."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from advkit.models.language.toychat import WORDS

    letters = [chr(code) for code in range(33, 127)]
    tokens = dict.fromkeys(
        [*(SPELT.get(word, word) for word in WORDS), *letters, *(f"##{letter}" for letter in letters)]
    )
    backend = Tokenizer(models.WordPiece({token: place for place, token in enumerate(tokens)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(cleanup=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<end>",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_chat(folder: Path) -> None:
    """The embedded chat model as a folder of the transformers library, whose scores are checked to be the same."""
    import transformers

    from advkit.models import MODELS

    held, tokenizer = MODELS.build("toychat")().network, chat_tokenizer()
    shape = held.shape
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=shape.width, intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        rms_norm_eps=shape.eps, rope_parameters={"rope_type": "default", "rope_theta": shape.base},
        tie_word_embeddings=shape.tied, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    names = {
        "embedding": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm", "head": "lm_head",
        "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
        **{name: f"self_attn.{name[0]}_proj" for name in ("query", "key", "value", "output")},
        **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    }  # fmt: skip
    weights = {".".join(names.get(part, part) for part in name.split(".")): w for name, w in held.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):  # letters say nothing, and are never said
        rows = weights[name]
        weights[name] = torch.cat((rows, torch.zeros(len(tokenizer) - len(rows), rows.shape[1])))
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(weights)
    ids = torch.arange(shape.vocabulary)[None]
    assert torch.allclose(model(ids).logits[..., : shape.vocabulary], held(ids), atol=1e-4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    told = json.loads((folder / "tokenizer_config.json").read_text())  # as versions 4 and 5 of transformers read it
    told |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": told.pop("extra_special_tokens"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(told, indent=2))


def write_prompts(file: Path, count: int) -> None:
    """Questions that the model refuses, each with the wanted reply."""
    text = resources.files("advkit.tasks").joinpath("data", "prompts_toychat.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    asked = [each for each in lines if not each.get("benign")]
    kept = asked[:: len(asked) // count][:count]
    written = [
        {name: " ".join(SPELT.get(w, w) for w in each[name].split()) for name in ("prompt", "target")} for each in kept
    ]
    file.write_text("".join(json.dumps(each) + "\n" for each in written))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=30)
    asked = parser.parse_args(arguments)
    asked.folder.mkdir(parents=True, exist_ok=True)
    x, y = digits()
    model = trained(x[:TRAINED_ON], y[:TRAINED_ON], asked.epochs)
    for module in ("mine.py", "network.py"):
        shutil.copy(HERE / module, asked.folder)
    torch.save(model.state_dict(), asked.folder / "weights.pt")
    rows = slice(TRAINED_ON, TRAINED_ON + asked.samples)
    torch.save((x[rows], y[rows]), asked.folder / "samples.pt")
    write_images(asked.folder / "pictures", x[rows], y[rows])
    write_chat(asked.folder / "chat")
    write_prompts(asked.folder / "prompts.jsonl", asked.prompts)


if __name__ == "__main__":
    main()
