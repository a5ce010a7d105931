# Drives the entry renamed, whose boundary has names of its own: eps for the strain, sigma for the stress.
[Drivers]
  [driver]
    type = TransientDriver
    model = 'promoted'
    prescribed_time = 'times'
    prescribed_SR2_names = 'eps'
    prescribed_SR2_values = 'strains'
  []
[]
