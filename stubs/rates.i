# A bar held at a fixed strain relaxes by Norton creep, wears under its stress, and tells how fast it relaxes. MPa, s.
#
# Two implicit segments with one scalar unknown each, the stress and then the wear; then an explicit one divides by the
# time step, which may be zero.

[Tensors]
  # 20 steps of growing length, for three bars with different stress at the start.
  [times]
    type = Python
    expr = 'Scalar(torch.linspace(0.0, 10.0, 21, dtype=torch.float64) ** 2)'
  []
  [pulls]
    type = Python
    expr = 'Scalar(torch.zeros(21, 3, dtype=torch.float64))'
  []
  [stresses_at_start]
    type = Python
    expr = 'Scalar(torch.tensor([250.0, 180.0, 120.0], dtype=torch.float64))'
  []
[]

[Drivers]
  [driver]
    type = TransientDriver
    model = 'rates'
    prescribed_time = 'times'
    prescribed_Scalar_names = 'strain_rate'
    prescribed_Scalar_values = 'pulls'
    ic_Scalar_names = 'stress'
    ic_Scalar_values = 'stresses_at_start'
  []
[]

[Models]
  [creep]
    type = PerzynaPlasticFlowRate
    yield_function = 'stress'
    flow_rate = 'creep_rate'
    reference_stress = 1400
    exponent = 4.5
  []
  [stress_rate]
    type = ScalarLinearCombination
    from = 'strain_rate creep_rate'
    to = 'stress_rate'
    weights = '150000 -150000'
  []
  [stress_step]
    type = ScalarBackwardEulerTimeIntegration
    variable = 'stress'
  []
  [residual]
    type = ComposedModel
    models = 'creep stress_rate stress_step'
  []
  [guess]
    type = ConstantExtrapolationPredictor
    unknowns_Scalar = 'stress'
  []
  [update]
    type = ImplicitUpdate
    equation_system = 'relaxation'
    solver = 'newton'
    predictor = 'guess'
  []
  [load]
    type = ScalarLinearCombination
    from = 'stress wear'
    to = 'load'
    weights = '1 -200'
  []
  [grinding]
    type = PerzynaPlasticFlowRate
    yield_function = 'load'
    flow_rate = 'wear_rate'
    reference_stress = 300
    exponent = 3
  []
  [wear_step]
    type = ScalarBackwardEulerTimeIntegration
    variable = 'wear'
  []
  [wear_residual]
    type = ComposedModel
    models = 'load grinding wear_step'
  []
  [wear_update]
    type = ImplicitUpdate
    equation_system = 'abrasion'
    solver = 'newton'
  []
  [speed]
    type = ScalarVariableRate
    variable = 'stress'
  []
  [rates]
    type = ComposedModel
    models = 'update wear_update speed'
    additional_outputs = 'stress'
  []
[]

[EquationSystems]
  [relaxation]
    type = NonlinearSystem
    model = 'residual'
    unknowns = 'stress'
  []
  [abrasion]
    type = NonlinearSystem
    model = 'wear_residual'
    unknowns = 'wear'
  []
[]

[Solvers]
  [newton]
    type = Newton
    linear_solver = 'lu'
    abs_tol = 1e-9
    rel_tol = 1e-11
    max_its = 30
  []
  [lu]
    type = DenseLU
  []
[]
