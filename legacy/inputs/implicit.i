# A scalar that flows with the drive and is held back by a saturating hardening:
#   dx/dt = f - R (1 - exp(-d x)), one backward Euler step per call, solved by Newton.
# A drive below zero makes the residual bend so that a full Newton step overshoots, and the line search has work.

[Tensors]
  [hours]
    type = Python
    expr = 'Scalar(torch.tensor([0.0, 0.5, 1.5, 2.0], dtype=torch.float64))'
  []
  # Two specimens: one is pushed up, one is pulled down.
  [drives]
    type = Python
    expr = 'Scalar(torch.tensor([[0.0, 0.0], [1.0, -2.0], [1.5, -9.0], [0.5, -1.0]], dtype=torch.float64))'
  []
[]

[Models]
  [hardening]
    type = VoceIsotropicHardening
    equivalent_plastic_strain = 'x'
    isotropic_hardening = 'h'
    saturated_hardening = '2.0'
    saturation_rate = '3.0'
  []
  [flow]
    type = ScalarLinearCombination
    from = 'f h'
    weights = '1.0 -1.0'
    to = 'x_rate'
  []
  [step]
    type = ScalarBackwardEulerTimeIntegration
    variable = 'x'
  []
  [residual]
    type = ComposedModel
    models = 'hardening flow step'
  []
  [creep]
    type = ImplicitUpdate
    equation_system = 'balance'
    solver = 'newton'
  []
[]

[EquationSystems]
  [balance]
    type = NonlinearSystem
    model = 'residual'
    unknowns = 'x'
  []
[]

[Solvers]
  [lu]
    type = DenseLU
  []
  [newton]
    type = NewtonWithLineSearch
    linear_solver = 'lu'
    abs_tol = 1e-12
    rel_tol = 1e-13
    max_its = 40
    linesearch_type = BACKTRACKING
    max_linesearch_iterations = 6
    linesearch_cutback = 2.0
    linesearch_stopping_criteria = 1e-3
  []
[]

# The driver speaks to neml2 3.0.6 and later; before, its word was force_ for prescribed_. A compile does not mind.
[Drivers]
  [history]
    type = TransientDriver
    model = 'creep'
    prescribed_time = 'hours'
    prescribed_Scalar_names = 'f'
    prescribed_Scalar_values = 'drives'
  []
[]
