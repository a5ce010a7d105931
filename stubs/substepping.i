# Viscoplasticity of a soft metal in steps too large for one Newton solve. Stress in MPa, time in s.
#
# Unknowns: plastic_strain (6) and equivalent_plastic_strain (1). Only the current strain enters the model; as it is
# named incremental, the compiled model also asks for the strain before the step, and cuts a step that fails.
# neml2 cuts steps in compiled models only. For eager runs of this file there is the same model without cuts,
# whole_step, with two drivers: whole_driver takes the same steps and fails, fine_driver takes small ones.

[Tensors]
  # 4 steps of 1 s to 6 % strain, at three material points that are strained by less and less. The first two are
  # too much for one Newton solve in some step, the third is not.
  [times]
    type = Python
    expr = 'Scalar(torch.linspace(0.0, 4.0, 5, dtype=torch.float64))'
  []
  [paths]
    type = Python
    expr = 'torch.tensor([[1.0, -0.5, -0.5, 0.0, 0.0, 0.0], [0.2, 0.1, -0.3, 0.0, 0.5, 0.0], [0.02, -0.01, -0.01, 0.0, 0.0, 0.0]], dtype=torch.float64)'
  []
  [strains]
    type = Python
    expr = 'SR2(torch.linspace(0.0, 6.0e-2, 5, dtype=torch.float64).reshape(-1, 1, 1) * paths)'
  []
  [fine_times]
    type = Python
    expr = 'Scalar(torch.linspace(0.0, 4.0, 201, dtype=torch.float64))'
  []
  [fine_strains]
    type = Python
    expr = 'SR2(torch.linspace(0.0, 6.0e-2, 201, dtype=torch.float64).reshape(-1, 1, 1) * paths)'
  []
[]

[Drivers]
  [driver]
    type = TransientDriver
    model = 'substepping'
    prescribed_time = 'times'
    prescribed_SR2_names = 'strain'
    prescribed_SR2_values = 'strains'
  []
  [whole_driver]
    type = TransientDriver
    model = 'whole_step'
    prescribed_time = 'times'
    prescribed_SR2_names = 'strain'
    prescribed_SR2_values = 'strains'
  []
  [fine_driver]
    type = TransientDriver
    model = 'whole_step'
    prescribed_time = 'fine_times'
    prescribed_SR2_names = 'strain'
    prescribed_SR2_values = 'fine_strains'
  []
[]

[Models]
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
    coefficients = '60000 0.35'
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
    saturated_hardening = 20
    saturation_rate = 150
  []
  [overstress]
    type = YieldFunction
    effective_stress = 'mises_stress'
    isotropic_hardening = 'hardening_stress'
    yield_function = 'overstress'
    yield_stress = 30
  []
  [viscosity]
    type = PerzynaPlasticFlowRate
    yield_function = 'overstress'
    flow_rate = 'flow_rate'
    reference_stress = 40
    exponent = 8
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
  [substepping]
    type = ImplicitUpdate
    equation_system = 'flow'
    solver = 'newton'
    predictor = 'guess'
    max_substepping_level = 6
    incremental_variables = 'strain'
  []
  [whole_step]
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
    type = Newton
    linear_solver = 'lu'
    abs_tol = 1e-12
    rel_tol = 1e-10
    max_its = 15
  []
  [lu]
    type = DenseLU
  []
[]
