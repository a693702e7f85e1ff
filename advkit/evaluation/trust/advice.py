"""What to do about each flag that a report may raise, by the schema's flag ids."""

from __future__ import annotations

from collections.abc import Mapping

ADVICE: Mapping[str, str] = {
    "training_mode": "call .eval() on it",
    "randomized_output": "average the attack's gradients over draws (eot=20); verdicts go by majority of draws",
    "batch_dependence": "use running statistics, and no operation across samples, when the model predicts",
    "state_between_calls": "reset the model's state at the start of every call",
    "input_changed": "let the model work on a copy (x = x.clone(), no in-place operations on its argument)",
    "probability_output": "let it output logits",
    "inference_time_optimization": "attack the inner loop too (unroll it, or use an attacker view), and run square",
    "not_differentiable": "give the defense an attacker view (BPDA), or attack with scores alone (square)",
    "nonfinite_gradient": "look for log(0), 0/0 or overflow in the model",
    "zero_gradient": "give the attack a useful backward pass (BPDA, a smooth surrogate), or attack with square",
    "zero_gradient_ce_only": "use loss=margin",
    "low_precision": "evaluate it in float32 (.float())",
    "too_few_classes": "use loss=margin",
    "preprocessing_mismatch": "check that mean and std are inside the model, the order of its labels and its weights",
    "budget_violation": "project the attack's result into the ball and the box",
    "black_box_beats_white_box": "use BPDA or another loss, and report the worst case of both",
    "random_search_finds_failures": "treat the gradient-based figure as an upper bound; use BPDA or another loss",
    "iterative_weaker_than_single_step": "smooth the gradient (eot over noise), or attack with square",
    "non_monotone_in_eps": "the attack fails at the larger radius: take more steps or another loss",
    "gradient_mismatch": "look for a custom backward, a detach or rounding inside the model",
    "nondeterministic_rerun": "set torch.use_deterministic_algorithms(True); look for state that calls leave behind",
    "unstable_predictions": "average gradients over draws or over noise (eot=20 or more)",
    "silent_success": "let the attack return its best point so far (keep=best)",
    "incomplete_optimization": "take more steps, or another step size, until the loss stops falling",
    "returned_unchanged": "ask why it gave up (its settings, its gradient), and compare with pgd; robust is unproven",
    "far_inside_the_ball": "take larger or more steps, or another attack (pgd); robust is unproven",
    "attack_error": "fix the attack, or its settings, and run again with another --out",
    "model_error": "let the model answer every input of its space, and run again with another --out",
    "surrogate_error": "let the surrogate answer every input of its space, and run again with another --out",
    "judge_error": "let the judge answer every reply, the empty one too, and run again with another --out",
    "goal_error": "fix the goal or the threat model, and run again with another --out",
    "timed_out": "see what hangs, or give it more time (--sample-timeout), and run again with another --out",
    "companion_missing": "name public surrogates of the task with --threat-model tapm:sources=zoo:NAME+zoo:NAME",
    "transfer_failure": "attack the model itself, or a surrogate that resembles it more",
    "not_refused_clean": "take prompts that the model refuses, or judges that know its words of refusal "
    "(judges=[refusal:phrases=...])",
    "garbled_replies": "read the replies (transcripts.md): an untrained model, a wrong template or half precision",
    "benign_failure": "check the template, the weights and the twins' targets before anything is read off",
    "no_chat_template": "load a model with its chat template; base models have none and refuse nothing",
    "unconstrained_attack_failure": "change the attacker's loss (margin in place of ce); look for hidden gradients",
}
