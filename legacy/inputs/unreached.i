# Three segments in a row of which no two inputs reach everything:
#   early = R (1 - exp(-d b)),   x relaxes towards f,   late = 2 early - 3 x
# d(early)/df has no path at all, and a derivative of late by b or by f leaves one of the segments aside.

[Models]
  [first]
    type = VoceIsotropicHardening
    equivalent_plastic_strain = 'b'
    isotropic_hardening = 'early'
    saturated_hardening = '1.7'
    saturation_rate = '0.9'
  []
  [relax]
    type = ScalarLinearCombination
    from = 'f x'
    weights = '1.0 -0.8'
    to = 'x_rate'
  []
  [step]
    type = ScalarBackwardEulerTimeIntegration
    variable = 'x'
  []
  [residual]
    type = ComposedModel
    models = 'relax step'
  []
  [second]
    type = ImplicitUpdate
    equation_system = 'balance'
    solver = 'newton'
  []
  [third]
    type = ScalarLinearCombination
    from = 'early x'
    weights = '2.0 -3.0'
    to = 'late'
  []
  [chain]
    type = ComposedModel
    models = 'first second third'
    additional_outputs = 'early x'
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
    type = Newton
    linear_solver = 'lu'
  []
[]
