import advkit

attack, task = "gcg:steps=15,width=48,topk=32,length=8", "prompts:file=prompts.jsonl"
print(advkit.evaluate(attack, task=task, model="hf:chat", threat_model="suffix:n=8"))
