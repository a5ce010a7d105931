# Plasticity of one face-centred cubic crystal with 12 slip systems, at small strains: the lattice does not turn.
# Stress in MPa, time in s, rates in 1/s; the orientation is an input (modified Rodrigues parameters).
#
# Unknowns: elastic_strain (6) and slip_hardening (1). The slip quantities (resolved shears, strengths, rates) live on
# a sub-batch axis of 12 inside the residual.

[Tensors]
  # 30 steps in 12 s, at two crystals of different orientation.
  [times]
    type = Python
    expr = 'Scalar(torch.linspace(0.0, 12.0, 31, dtype=torch.float64))'
  []
  [stretchings]
    type = Python
    expr = 'SR2(torch.tensor([8.0e-4, -4.0e-4, -4.0e-4, 0.0, 0.0, 2.0e-4], dtype=torch.float64).expand(31, 2, 6).contiguous())'
  []
  [orientations]
    type = Python
    expr = 'MRP(torch.tensor([[0.0, 0.0, 0.0], [0.05, -0.12, 0.2]], dtype=torch.float64).expand(31, 2, 3).contiguous())'
  []
  [slip_vectors]
    type = Python
    expr = 'MillerIndex(torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64))'
  []
  [plane_normals]
    type = Python
    expr = 'MillerIndex(torch.tensor([[1.0, 1.0, 1.0]], dtype=torch.float64))'
  []
[]

[Drivers]
  [driver]
    type = TransientDriver
    model = 'crystal'
    prescribed_time = 'times'
    prescribed_SR2_names = 'stretching'
    prescribed_SR2_values = 'stretchings'
    prescribed_MRP_names = 'orientation'
    prescribed_MRP_values = 'orientations'
  []
[]

[Data]
  [lattice]
    type = CubicCrystal
    lattice_parameter = 1.0
    slip_directions = 'slip_vectors'
    slip_planes = 'plane_normals'
  []
[]

[Models]
  [rotation]
    type = RotationMatrix
    from = 'orientation'
    to = 'rotation'
  []
  [hooke]
    type = LinearIsotropicElasticity
    strain = 'elastic_strain'
    stress = 'stress'
    coefficients = '115000 0.34'
    coefficient_types = 'YOUNGS_MODULUS POISSONS_RATIO'
  []
  [shears]
    type = ResolvedShear
    stress = 'stress'
    orientation_matrix = 'rotation'
    resolved_shears = 'resolved_shears'
    crystal_geometry = 'lattice'
  []
  [strengths]
    type = SingleSlipStrengthMap
    slip_hardening = 'slip_hardening'
    slip_strengths = 'slip_strengths'
    constant_strength = 40
    crystal_geometry = 'lattice'
  []
  [slip]
    type = PowerLawSlipRule
    resolved_shears = 'resolved_shears'
    slip_strengths = 'slip_strengths'
    slip_rates = 'slip_rates'
    gamma0 = 1e-3
    n = 6
  []
  [total_slip]
    type = SumSlipRates
    slip_rates = 'slip_rates'
    sum_slip_rates = 'total_slip_rate'
  []
  [slip_hardening]
    type = VoceSingleSlipHardeningRule
    slip_hardening = 'slip_hardening'
    sum_slip_rates = 'total_slip_rate'
    slip_hardening_rate = 'slip_hardening_rate'
    initial_slope = 300
    saturated_hardening = 60
  []
  [plastic_stretching]
    type = PlasticDeformationRate
    orientation_matrix = 'rotation'
    slip_rates = 'slip_rates'
    plastic_deformation_rate = 'plastic_stretching'
    crystal_geometry = 'lattice'
  []
  [elastic_rate]
    type = SR2LinearCombination
    from = 'stretching plastic_stretching'
    to = 'elastic_strain_rate'
    weights = '1 -1'
  []
  [strain_step]
    type = SR2BackwardEulerTimeIntegration
    variable = 'elastic_strain'
  []
  [hardening_step]
    type = ScalarBackwardEulerTimeIntegration
    variable = 'slip_hardening'
  []
  [residual]
    type = ComposedModel
    models = 'rotation hooke shears strengths slip total_slip slip_hardening plastic_stretching elastic_rate strain_step hardening_step'
  []
  [guess]
    type = ConstantExtrapolationPredictor
    unknowns_SR2 = 'elastic_strain'
    unknowns_Scalar = 'slip_hardening'
  []
  [crystal]
    type = ImplicitUpdate
    equation_system = 'lattice_balance'
    solver = 'newton'
    predictor = 'guess'
  []
[]

[EquationSystems]
  [lattice_balance]
    type = NonlinearSystem
    model = 'residual'
    unknowns = 'elastic_strain slip_hardening'
  []
[]

[Solvers]
  [newton]
    type = NewtonWithLineSearch
    linear_solver = 'lu'
    abs_tol = 1e-10
    rel_tol = 1e-8
    max_its = 50
    max_linesearch_iterations = 6
  []
  [lu]
    type = DenseLU
  []
[]
