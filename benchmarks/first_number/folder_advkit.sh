advkit evaluate --attack pgd --task folder:path=pictures,resize=32,crop=32 --model python:mine:picture_model --threat-model linf:eps=0.15
