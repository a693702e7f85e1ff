mkdir split
cp -r pictures split/test
advkit evaluate --attack pgd --task folder:path=split,resize=32,crop=32 --model python:factories:pictures --threat-model linf:eps=0.15
