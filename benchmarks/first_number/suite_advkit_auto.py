from mine import model, x, y

import advkit

print(advkit.evaluate("auto", task=(x, y), model=model, threat_model="linf:eps=0.15"))
