advkit evaluate --attack autoattack --task python:mine:samples --model python:mine:model --threat-model linf:eps=0.15
