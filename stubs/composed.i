# Thermo-viscoplasticity in three parts: thermal strain first (explicit), then the plastic strains (implicit),
# then the stress from what is left (explicit). Stress in MPa, temperature in K, time in s.
#
# The implicit part has the unknowns plastic_strain (6) and equivalent_plastic_strain (1).

[Tensors]
  # 40 steps in 20 s: two material points pulled to 1.2 % and heated by 150 K, one of them with shear.
  [times]
    type = Python
    expr = 'Scalar(torch.linspace(0.0, 20.0, 41, dtype=torch.float64))'
  []
  [strains]
    type = Python
    expr = 'SR2(torch.linspace(0.0, 1.2e-2, 41, dtype=torch.float64).reshape(-1, 1, 1) * torch.tensor([[1.0, -0.3, -0.3, 0.0, 0.0, 0.0], [0.5, -0.1, -0.1, 0.0, 0.4, 0.8]], dtype=torch.float64))'
  []
  [temperatures]
    type = Python
    expr = 'Scalar(torch.linspace(300.0, 450.0, 41, dtype=torch.float64).unsqueeze(-1).expand(41, 2).contiguous())'
  []
[]

[Drivers]
  [driver]
    type = TransientDriver
    model = 'composed'
    prescribed_time = 'times'
    prescribed_SR2_names = 'strain'
    prescribed_SR2_values = 'strains'
    prescribed_Scalar_names = 'temperature'
    prescribed_Scalar_values = 'temperatures'
  []
[]

[Models]
  [expansion]
    type = ThermalEigenstrain
    temperature = 'temperature'
    eigenstrain = 'thermal_strain'
    reference_temperature = 300
    CTE = 1.2e-5
  []
  [mechanical]
    type = SR2LinearCombination
    from = 'strain thermal_strain'
    to = 'mechanical_strain'
    weights = '1 -1'
  []
  [elastic]
    type = SR2LinearCombination
    from = 'mechanical_strain plastic_strain'
    to = 'elastic_strain'
    weights = '1 -1'
  []
  [hooke]
    type = LinearIsotropicElasticity
    strain = 'elastic_strain'
    stress = 'stress'
    coefficients = '120000 0.34'
    coefficient_types = 'YOUNGS_MODULUS POISSONS_RATIO'
  []
  [mises]
    type = SR2Invariant
    invariant_type = VONMISES
    tensor = 'stress'
    invariant = 'mises_stress'
  []
  [hardening]
    type = VoceIsotropicHardening
    equivalent_plastic_strain = 'equivalent_plastic_strain'
    isotropic_hardening = 'hardening_stress'
    saturated_hardening = 90
    saturation_rate = 120
  []
  [overstress]
    type = YieldFunction
    effective_stress = 'mises_stress'
    isotropic_hardening = 'hardening_stress'
    yield_function = 'overstress'
    yield_stress = 110
  []
  [viscosity]
    type = PerzynaPlasticFlowRate
    yield_function = 'overstress'
    flow_rate = 'flow_rate'
    reference_stress = 80
    exponent = 3
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
  [guess]
    type = ConstantExtrapolationPredictor
    unknowns_SR2 = 'plastic_strain'
    unknowns_Scalar = 'equivalent_plastic_strain'
  []
  [update]
    type = ImplicitUpdate
    equation_system = 'flow'
    solver = 'newton'
    predictor = 'guess'
  []
  [composed]
    type = ComposedModel
    models = 'expansion mechanical update elastic hooke'
    additional_outputs = 'plastic_strain equivalent_plastic_strain'
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
