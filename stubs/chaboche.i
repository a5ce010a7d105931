# Chaboche viscoplasticity: two back stresses with dynamic and static recovery, and isotropic hardening of Voce's kind,
# under cyclic strain. Stress in MPa, time in s.
#
# Unknowns: stress (6), fast_back_stress (6), slow_back_stress (6) and equivalent_plastic_strain (1).
# The guess extrapolates linearly, so the model asks for values two steps back.

[Tensors]
  # Two cycles of +-0.8 % in 80 s, 80 steps, at two material points: near uniaxial, and with shear.
  [times]
    type = Python
    expr = 'Scalar(torch.linspace(0.0, 80.0, 81, dtype=torch.float64))'
  []
  [strains]
    type = Python
    expr = 'SR2(8.0e-3 * torch.sin(torch.linspace(0.0, 4.0 * math.pi, 81, dtype=torch.float64)).reshape(-1, 1, 1) * torch.tensor([[1.0, -0.48, -0.48, 0.0, 0.0, 0.0], [0.4, -0.2, -0.1, 0.7, 0.0, 0.3]], dtype=torch.float64))'
  []
[]

[Drivers]
  [driver]
    type = TransientDriver
    model = 'chaboche'
    prescribed_time = 'times'
    prescribed_SR2_names = 'strain'
    prescribed_SR2_values = 'strains'
  []
[]

[Models]
  [total_rate]
    type = SR2VariableRate
    variable = 'strain'
  []
  [shifted]
    type = SR2LinearCombination
    from = 'stress fast_back_stress slow_back_stress'
    to = 'shifted_stress'
    weights = '1 -1 -1'
  []
  [mises]
    type = SR2Invariant
    invariant_type = VONMISES
    tensor = 'shifted_stress'
    invariant = 'mises_stress'
  []
  [hardening]
    type = VoceIsotropicHardening
    equivalent_plastic_strain = 'equivalent_plastic_strain'
    isotropic_hardening = 'hardening_stress'
    saturated_hardening = 45
    saturation_rate = 25
  []
  [overstress]
    type = YieldFunction
    effective_stress = 'mises_stress'
    isotropic_hardening = 'hardening_stress'
    yield_function = 'overstress'
    yield_stress = 95
  []
  [viscosity]
    type = PerzynaPlasticFlowRate
    yield_function = 'overstress'
    flow_rate = 'flow_rate'
    reference_stress = 130
    exponent = 3.5
  []
  [direction]
    type = AssociativeJ2FlowDirection
    mandel_stress = 'shifted_stress'
    flow_direction = 'flow_direction'
  []
  [plastic_rate]
    type = AssociativePlasticFlow
    flow_rate = 'flow_rate'
    flow_direction = 'flow_direction'
    plastic_strain_rate = 'plastic_strain_rate'
  []
  [fast]
    type = ChabochePlasticHardening
    back_stress = 'fast_back_stress'
    flow_rate = 'flow_rate'
    flow_direction = 'flow_direction'
    C = 42000
    g = 600
    A = 2e-7
    a = 2
  []
  [slow]
    type = ChabochePlasticHardening
    back_stress = 'slow_back_stress'
    flow_rate = 'flow_rate'
    flow_direction = 'flow_direction'
    C = 6500
    g = 70
    A = 1e-7
    a = 2.5
  []
  [elastic_rate]
    type = SR2LinearCombination
    from = 'strain_rate plastic_strain_rate'
    to = 'elastic_strain_rate'
    weights = '1 -1'
  []
  [hooke]
    type = LinearIsotropicElasticity
    strain = 'elastic_strain'
    stress = 'stress'
    rate_form = true
    coefficients = '165000 0.31'
    coefficient_types = 'YOUNGS_MODULUS POISSONS_RATIO'
  []
  [stress_step]
    type = SR2BackwardEulerTimeIntegration
    variable = 'stress'
  []
  [fast_step]
    type = SR2BackwardEulerTimeIntegration
    variable = 'fast_back_stress'
  []
  [slow_step]
    type = SR2BackwardEulerTimeIntegration
    variable = 'slow_back_stress'
  []
  [plastic_step]
    type = ScalarBackwardEulerTimeIntegration
    variable = 'equivalent_plastic_strain'
    rate = 'flow_rate'
  []
  [residual]
    type = ComposedModel
    models = 'total_rate shifted mises hardening overstress viscosity direction plastic_rate fast slow elastic_rate hooke stress_step fast_step slow_step plastic_step'
  []
  [guess]
    type = LinearExtrapolationPredictor
    unknowns_SR2 = 'stress fast_back_stress slow_back_stress'
    unknowns_Scalar = 'equivalent_plastic_strain'
  []
  [chaboche]
    type = ImplicitUpdate
    equation_system = 'balance'
    solver = 'newton'
    predictor = 'guess'
  []
[]

[EquationSystems]
  [balance]
    type = NonlinearSystem
    model = 'residual'
    unknowns = 'stress fast_back_stress slow_back_stress equivalent_plastic_strain'
  []
[]

[Solvers]
  [newton]
    type = NewtonWithLineSearch
    linear_solver = 'lu'
    abs_tol = 1e-8
    rel_tol = 1e-10
    max_its = 50
    max_linesearch_iterations = 8
  []
  [lu]
    type = DenseLU
  []
[]
