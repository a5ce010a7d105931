# Viscoplasticity whose first guess comes from a coordinate descent on the flow rate. Stress in MPa, time in s.
#
# Unknowns: plastic_strain (6) and equivalent_plastic_strain (1). The guess freezes the flow direction at the elastic
# trial state, reduces the update to one equation in the flow rate, and solves that by sweeps. A compiled model runs
# the sweeps as a loop around one graph.

[Tensors]
  # 15 steps in 30 s to 3 % strain, at two material points.
  [times]
    type = Python
    expr = 'Scalar(torch.linspace(0.0, 30.0, 16, dtype=torch.float64))'
  []
  [strains]
    type = Python
    expr = 'SR2(torch.linspace(0.0, 3.0e-2, 16, dtype=torch.float64).reshape(-1, 1, 1) * torch.tensor([[1.0, -0.5, -0.5, 0.0, 0.0, 0.0], [0.3, -0.1, -0.2, 0.5, 0.0, 0.5]], dtype=torch.float64))'
  []
[]

[Drivers]
  [driver]
    type = TransientDriver
    model = 'predictor_loop'
    prescribed_time = 'times'
    prescribed_SR2_names = 'strain'
    prescribed_SR2_values = 'strains'
  []
[]

[Models]
  # The laws, used by the residual and by the guess.
  [elastic]
    type = SR2LinearCombination
    from = 'strain plastic_strain'
    to = 'elastic_strain'
    weights = '1 -1'
  []
  [hooke]
    type = LinearIsotropicElasticity
    strain = 'elastic_strain'
    stress = 'stress'
    coefficients = '110000 0.33'
    coefficient_types = 'YOUNGS_MODULUS POISSONS_RATIO'
  []
  [mises]
    type = SR2Invariant
    invariant_type = VONMISES
    tensor = 'stress'
    invariant = 'mises_stress'
  []
  [hardening]
    type = LinearIsotropicHardening
    equivalent_plastic_strain = 'equivalent_plastic_strain'
    isotropic_hardening = 'hardening_stress'
    hardening_modulus = 900
  []
  [overstress]
    type = YieldFunction
    effective_stress = 'mises_stress'
    isotropic_hardening = 'hardening_stress'
    yield_function = 'overstress'
    yield_stress = 140
  []
  [viscosity]
    type = PerzynaPlasticFlowRate
    yield_function = 'overstress'
    flow_rate = 'flow_rate'
    reference_stress = 75
    exponent = 5
  []
  [direction]
    type = AssociativeJ2FlowDirection
    mandel_stress = 'stress'
    flow_direction = 'flow_direction'
  []
  [plastic_rate]
    type = AssociativePlasticFlow
    flow_rate = 'flow_rate'
    flow_direction = 'flow_direction'
    plastic_strain_rate = 'plastic_strain_rate'
  []

  # The residual.
  [strain_step]
    type = SR2BackwardEulerTimeIntegration
    variable = 'plastic_strain'
  []
  [hardening_step]
    type = ScalarBackwardEulerTimeIntegration
    variable = 'equivalent_plastic_strain'
    rate = 'flow_rate'
  []
  [residual]
    type = ComposedModel
    models = 'elastic hooke mises hardening overstress viscosity direction plastic_rate strain_step hardening_step'
  []

  # The guess: direction at the trial state, ...
  [trial_elastic]
    type = SR2LinearCombination
    from = 'strain plastic_strain~1'
    to = 'trial_elastic_strain'
    weights = '1 -1'
  []
  [trial_hooke]
    type = LinearIsotropicElasticity
    strain = 'trial_elastic_strain'
    stress = 'trial_stress'
    coefficients = '110000 0.33'
    coefficient_types = 'YOUNGS_MODULUS POISSONS_RATIO'
  []
  [trial_direction]
    type = AssociativeJ2FlowDirection
    mandel_stress = 'trial_stress'
    flow_direction = 'trial_direction'
  []
  # ... overstress as a function of the flow rate along that direction, ...
  [path_rate]
    type = AssociativePlasticFlow
    flow_rate = 'path_flow_rate'
    flow_direction = 'trial_direction'
    plastic_strain_rate = 'path_plastic_rate'
  []
  [path_strain]
    type = SR2ForwardEulerTimeIntegration
    variable = 'plastic_strain'
    rate = 'path_plastic_rate'
  []
  [path_hardening]
    type = ScalarForwardEulerTimeIntegration
    variable = 'equivalent_plastic_strain'
    rate = 'path_flow_rate'
  []
  [path]
    type = ComposedModel
    models = 'path_rate path_strain path_hardening elastic hooke mises hardening overstress'
  []
  [reduction]
    type = RateCondensation
    model = 'path'
    rate = 'path_flow_rate'
    driving_force = 'overstress'
    coupling = 'flow_coupling'
    trial_driving_force = 'trial_overstress'
  []
  # ... its solution, and the strains that go with it.
  [sweeps]
    type = CoordinateDescentPredictor
    rate_law = 'viscosity'
    driving_force_input = 'overstress'
    coupling = 'flow_coupling'
    trial_driving_force = 'trial_overstress'
    rate = 'guessed_flow_rate'
    sweeps = 3
    bisections = 6
    polish = 2
  []
  [guessed_rate]
    type = AssociativePlasticFlow
    flow_rate = 'guessed_flow_rate'
    flow_direction = 'trial_direction'
    plastic_strain_rate = 'guessed_plastic_rate'
  []
  [guessed_strain]
    type = SR2ForwardEulerTimeIntegration
    variable = 'plastic_strain'
    rate = 'guessed_plastic_rate'
  []
  [guessed_hardening]
    type = ScalarForwardEulerTimeIntegration
    variable = 'equivalent_plastic_strain'
    rate = 'guessed_flow_rate'
  []
  [guess]
    type = ComposedModel
    models = 'trial_elastic trial_hooke trial_direction reduction sweeps guessed_rate guessed_strain guessed_hardening'
  []

  [predictor_loop]
    type = ImplicitUpdate
    equation_system = 'flow'
    solver = 'newton'
    predictor = 'guess'
  []
[]

[EquationSystems]
  [flow]
    type = NonlinearSystem
    model = 'residual'
    unknowns = 'plastic_strain equivalent_plastic_strain'
  []
[]

[Solvers]
  [newton]
    type = NewtonWithLineSearch
    linear_solver = 'lu'
    abs_tol = 1e-12
    rel_tol = 1e-10
    max_its = 40
    max_linesearch_iterations = 8
  []
  [lu]
    type = DenseLU
  []
[]
