"""The growing model: slots, seeds, blending, incubation, gates, hosts and blueprints. No collectives, no telemetry."""
