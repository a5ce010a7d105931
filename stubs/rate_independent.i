# J2 plasticity without any rate: yield and flow exclude each other, by the complementarity function of Fischer and
# Burmeister, which has a kink. Stress in MPa.
#
# Unknowns: plastic_strain (6), equivalent_plastic_strain (1) and flow_rate (1), which here is a multiplier per unit time.

[Tensors]
  # Loaded beyond yield, unloaded into compression, and loaded again.
  [times]
    type = Python
    expr = 'Scalar(torch.linspace(0.0, 12.0, 49, dtype=torch.float64))'
  []
  [strains]
    type = Python
    expr = 'SR2(6.0e-3 * torch.sin(0.9 * torch.linspace(0.0, 12.0, 49, dtype=torch.float64)).reshape(-1, 1, 1) * torch.tensor([[1.0, -0.45, -0.45, 0.0, 0.0, 0.0], [0.2, 0.0, -0.1, 0.9, 0.0, 0.3]], dtype=torch.float64))'
  []
[]

[Drivers]
  [driver]
    type = TransientDriver
    model = 'rate_independent'
    prescribed_time = 'times'
    prescribed_SR2_names = 'strain'
    prescribed_SR2_values = 'strains'
  []
[]

[Models]
  [elastic_strain]
    type = SR2LinearCombination
    from = 'strain plastic_strain'
    to = 'elastic_strain'
    weights = '1 -1'
  []
  [hooke]
    type = LinearIsotropicElasticity
    strain = 'elastic_strain'
    stress = 'stress'
    coefficients = '70000 0.33'
    coefficient_types = 'YOUNGS_MODULUS POISSONS_RATIO'
  []
  [mises]
    type = SR2Invariant
    invariant_type = VONMISES
    tensor = 'stress'
    invariant = 'mises_stress'
  []
  [saturation]
    type = VoceIsotropicHardening
    equivalent_plastic_strain = 'equivalent_plastic_strain'
    isotropic_hardening = 'hardening_stress'
    saturated_hardening = 90
    saturation_rate = 40
  []
  [surface]
    type = YieldFunction
    effective_stress = 'mises_stress'
    isotropic_hardening = 'hardening_stress'
    yield_function = 'yield_function'
    yield_stress = 110
  []
  [complementarity]
    type = FBComplementarity
    a = 'yield_function'
    a_inequality = 'LE'
    b = 'flow_rate'
    b_inequality = 'GE'
    complementarity = 'flow_rate_residual'
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
  [plastic_step]
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
    models = 'elastic_strain hooke mises saturation surface complementarity direction plastic_rate plastic_step hardening_step'
  []
  [guess]
    type = ConstantExtrapolationPredictor
    unknowns_SR2 = 'plastic_strain'
    unknowns_Scalar = 'equivalent_plastic_strain flow_rate'
  []
  [flow]
    type = ImplicitUpdate
    equation_system = 'balance'
    solver = 'newton'
    predictor = 'guess'
  []
  [rate_independent]
    type = ComposedModel
    models = 'flow elastic_strain hooke'
    additional_outputs = 'plastic_strain equivalent_plastic_strain flow_rate'
  []
[]

[EquationSystems]
  [balance]
    type = NonlinearSystem
    model = 'residual'
    unknowns = 'plastic_strain equivalent_plastic_strain flow_rate'
  []
[]

[Solvers]
  [newton]
    type = NewtonWithLineSearch
    linear_solver = 'lu'
    abs_tol = 1e-10
    rel_tol = 1e-10
    max_its = 60
    max_linesearch_iterations = 8
  []
  [lu]
    type = DenseLU
  []
[]
