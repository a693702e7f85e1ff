from mine import picture_model

import advkit

task = "folder:path=pictures,resize=32,crop=32"
print(advkit.evaluate("autoattack", task=task, model=picture_model, threat_model="linf:eps=0.15"))
