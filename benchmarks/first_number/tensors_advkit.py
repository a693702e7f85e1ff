from mine import model, x, y

import advkit

print(advkit.evaluate("pgd", task=(x, y), model=model, threat_model="linf:eps=0.15"))
