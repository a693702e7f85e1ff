advkit evaluate --attack gcg:steps=15,width=48,topk=32,length=8 --task prompts:file=prompts.jsonl --model hf:chat --threat-model suffix:n=8
