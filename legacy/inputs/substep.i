# A scalar that flows with the strain increment and is held back by a stiff, saturating hardening:
#   x - x~1 = dstrain - (t - t~1) R (1 - exp(-d x)),   and an increment that fails may be halved up to six times.
# There are six iterations for a step, too few for a large one.

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
    from = 'h'
    weights = '-1.0'
    to = 'x_rate'
  []
  [step]
    type = ScalarBackwardEulerTimeIntegration
    variable = 'x'
  []
  [balance]
    type = ScalarLinearCombination
    from = 'x_residual dstrain'
    weights = '1.0 -1.0'
    to = 'balance'
  []
  [residual]
    type = ComposedModel
    models = 'hardening flow step balance'
  []
  [creep]
    type = ImplicitUpdate
    equation_system = 'system'
    solver = 'newton'
    max_substepping_level = 6
    incremental_variables = 'dstrain'
  []
[]

[EquationSystems]
  [system]
    type = NonlinearSystem
    model = 'residual'
    unknowns = 'x'
    residuals = 'balance'
  []
[]

[Solvers]
  [lu]
    type = DenseLU
  []
  [newton]
    type = Newton
    linear_solver = 'lu'
    abs_tol = 1e-12
    rel_tol = 1e-13
    max_its = 7
  []
[]
