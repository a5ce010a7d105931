# Viscoplasticity of a point that is pulled in one direction while the other stresses are held at what is prescribed.
# Stress in MPa, time in s.
#
# The control tells for each component whether its strain is prescribed (1) or its stress (0). What is not prescribed is
# the unknown free_value (6), beside equivalent_plastic_strain (1); strain and stress are picked from both.

[Tensors]
  # Three material points: uniaxial tension, tension with a lateral stress, and shear alone prescribed.
  [times]
    type = Python
    expr = 'Scalar(torch.linspace(0.0, 20.0, 41, dtype=torch.float64))'
  []
  [controls]
    type = Python
    expr = 'SR2(torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]], dtype=torch.float64).expand(41, 3, 6).contiguous())'
  []
  [prescribed]
    type = Python
    expr = 'SR2(torch.linspace(0.0, 1.0, 41, dtype=torch.float64).reshape(-1, 1, 1) * torch.tensor([[0.02, 0.0, 0.0, 0.0, 0.0, 0.0], [0.015, 60.0, 0.0, 0.0, 0.0, 0.0], [40.0, -20.0, 0.0, 0.0, 0.0, 0.02]], dtype=torch.float64))'
  []
[]

[Drivers]
  [driver]
    type = TransientDriver
    model = 'mixed_control'
    prescribed_time = 'times'
    prescribed_SR2_names = 'control prescribed_value'
    prescribed_SR2_values = 'controls prescribed'
  []
[]

[Models]
  [pick]
    type = MixedControlSetup
    control = 'control'
    threshold = 0.5
    x_above = 'prescribed_value'
    x_below = 'free_value'
    y = 'strain'
    z = 'stress'
  []
  [total_rate]
    type = SR2VariableRate
    variable = 'strain'
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
    hardening_modulus = 1500
  []
  [overstress]
    type = YieldFunction
    effective_stress = 'mises_stress'
    isotropic_hardening = 'hardening_stress'
    yield_function = 'overstress'
    yield_stress = 160
  []
  [viscosity]
    type = PerzynaPlasticFlowRate
    yield_function = 'overstress'
    flow_rate = 'flow_rate'
    reference_stress = 70
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
    coefficients = '110000 0.32'
    coefficient_types = 'YOUNGS_MODULUS POISSONS_RATIO'
  []
  [stress_step]
    type = SR2BackwardEulerTimeIntegration
    variable = 'stress'
    variable_residual = 'free_value_residual'
  []
  [plastic_step]
    type = ScalarBackwardEulerTimeIntegration
    variable = 'equivalent_plastic_strain'
    rate = 'flow_rate'
  []
  [residual]
    type = ComposedModel
    models = 'pick total_rate mises hardening overstress viscosity direction plastic_rate elastic_rate hooke stress_step plastic_step'
  []
  [guess]
    type = ConstantExtrapolationPredictor
    unknowns_SR2 = 'free_value'
    unknowns_Scalar = 'equivalent_plastic_strain'
  []
  [update]
    type = ImplicitUpdate
    equation_system = 'balance'
    solver = 'newton'
    predictor = 'guess'
  []
  [mixed_control]
    type = ComposedModel
    models = 'update pick'
    additional_outputs = 'free_value equivalent_plastic_strain'
  []
[]

[EquationSystems]
  [balance]
    type = NonlinearSystem
    model = 'residual'
    unknowns = 'free_value equivalent_plastic_strain'
  []
[]

[Solvers]
  [newton]
    type = NewtonWithLineSearch
    linear_solver = 'lu'
    abs_tol = 1e-7
    rel_tol = 1e-10
    max_its = 60
    max_linesearch_iterations = 8
  []
  [lu]
    type = DenseLU
  []
[]
