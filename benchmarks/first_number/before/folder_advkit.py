from pathlib import Path

from mine import picture_model

import advkit

Path("split").mkdir()
Path("split/test").symlink_to(Path("pictures").resolve())
task = "folder:path=split,resize=32,crop=32"
print(advkit.evaluate("pgd", task=task, model=picture_model, threat_model="linf:eps=0.15"))
