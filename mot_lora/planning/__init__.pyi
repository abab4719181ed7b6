from .cards import Card as Card
from .cards import find_card as find_card
from .cards import this_card as this_card
from .fit import PlanRecord as PlanRecord
from .fit import plan as plan
from .machine import MachineRecord as MachineRecord
from .machine import doctor as doctor
from .need import Need as Need
