advkit evaluate --attack autoattack --task python:mine:samples --model python:factories:digits --threat-model linf:eps=0.15
