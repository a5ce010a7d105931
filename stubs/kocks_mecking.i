# A metal that flows without rate when cold or fast, and with rate when hot or slow, under mixed control.
# Stress in MPa, length in mm, time in s, temperature in K.
#
# The normalized activation energy of Kocks and Mecking, from temperature and strain rate, switches between a yield surface
# (a complementarity condition, with its flow rate as unknown) and Perzyna's law, smoothly but fast. Unknowns are what is
# not prescribed of strain and stress (6), equivalent_plastic_strain (1) and the flow rate on the yield surface (1).

[Tensors]
  # Twenty points, each warmed from a temperature of its own and slower than the one before it. Most change their law on the
  # way; where one does, chord steps alone lead it astray in the nineteenth step.
  [durations]
    type = Python
    expr = 'Scalar(torch.logspace(-1.0, 5.0, 20, dtype=torch.float64))'
  []
  [times]
    type = Python
    expr = 'Scalar(torch.linspace(0.0, 1.0, 41, dtype=torch.float64).unsqueeze(-1) * durations.data)'
  []
  [temperatures]
    type = Python
    expr = 'Scalar(torch.lerp(torch.linspace(320.0, 450.0, 20, dtype=torch.float64), torch.linspace(650.0, 1100.0, 20, dtype=torch.float64), torch.linspace(0.0, 1.0, 41, dtype=torch.float64).unsqueeze(-1)))'
  []
  # Strains are prescribed where the control is 1: one along and one shear.
  [controls]
    type = Python
    expr = 'SR2(torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64).expand(41, 20, 6).contiguous())'
  []
  [prescribed]
    type = Python
    expr = 'SR2((torch.linspace(0.0, 1.0, 41, dtype=torch.float64).reshape(-1, 1, 1) * torch.tensor([0.1, 30.0, 80.0, -30.0, -30.0, -0.01], dtype=torch.float64)).expand(41, 20, 6).contiguous())'
  []
[]

[Drivers]
  [driver]
    type = TransientDriver
    model = 'kocks_mecking'
    prescribed_time = 'times'
    prescribed_SR2_names = 'control prescribed_value'
    prescribed_SR2_values = 'controls prescribed'
    prescribed_Scalar_names = 'temperature'
    prescribed_Scalar_values = 'temperatures'
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
  [rate_size]
    type = SR2Invariant
    invariant_type = EFFECTIVE_STRAIN
    tensor = 'strain_rate'
    invariant = 'effective_rate'
  []
  [energy]
    type = KocksMeckingActivationEnergy
    temperature = 'temperature'
    strain_rate = 'effective_rate'
    activation_energy = 'energy'
    shear_modulus = 58000
    eps0 = 2e9
    k = 1.380649e-20
    b = 2.5e-7
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
    hardening_modulus = 800
  []
  [strength]
    type = KocksMeckingYieldStress
    shear_modulus = 58000
    C = -5.3
  []
  [surface]
    type = YieldFunction
    effective_stress = 'mises_stress'
    isotropic_hardening = 'hardening_stress'
    yield_function = 'excess'
    yield_stress = 'strength'
  []
  [surface_flow]
    type = FBComplementarity
    a = 'excess'
    a_inequality = 'LE'
    b = 'surface_rate'
  []
  [overstress]
    type = YieldFunction
    effective_stress = 'mises_stress'
    isotropic_hardening = 'hardening_stress'
    yield_function = 'overstress'
    yield_stress = 0
  []
  [exponent]
    type = KocksMeckingRateSensitivity
    temperature = 'temperature'
    shear_modulus = 58000
    A = -15
    k = 1.380649e-20
    b = 2.5e-7
  []
  [reference_stress]
    type = KocksMeckingFlowViscosity
    temperature = 'temperature'
    shear_modulus = 58000
    A = -15
    B = -0.6
    eps0 = 2e9
    k = 1.380649e-20
    b = 2.5e-7
  []
  [viscous_flow]
    type = PerzynaPlasticFlowRate
    yield_function = 'overstress'
    flow_rate = 'viscous_rate'
    reference_stress = 'reference_stress'
    exponent = 'exponent'
  []
  [switch]
    type = KocksMeckingFlowSwitch
    activation_energy = 'energy'
    rate_independent_flow_rate = 'surface_rate'
    rate_dependent_flow_rate = 'viscous_rate'
    flow_rate = 'flow_rate'
    g0 = 0.313
    sharpness = 90
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
    coefficients = '150000 0.29'
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
    models = 'pick total_rate rate_size energy mises hardening surface surface_flow overstress viscous_flow switch direction plastic_rate elastic_rate hooke stress_step plastic_step'
  []
  [guess]
    type = ConstantExtrapolationPredictor
    unknowns_SR2 = 'free_value'
    unknowns_Scalar = 'equivalent_plastic_strain surface_rate'
  []
  [update]
    type = ImplicitUpdate
    equation_system = 'balance'
    solver = 'newton'
    predictor = 'guess'
  []
  [kocks_mecking]
    type = ComposedModel
    models = 'update pick'
    additional_outputs = 'free_value equivalent_plastic_strain'
  []
[]

[EquationSystems]
  [balance]
    type = NonlinearSystem
    model = 'residual'
    unknowns = 'free_value equivalent_plastic_strain surface_rate'
    residuals = 'free_value_residual equivalent_plastic_strain_residual complementarity'
  []
[]

[Solvers]
  [newton]
    type = Newton
    linear_solver = 'lu'
    abs_tol = 1e-9
    rel_tol = 1e-8
    max_its = 25
  []
  [lu]
    type = DenseLU
  []
[]
