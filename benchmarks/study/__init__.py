"""The paper's claims on a toy, tested by arms with tuned rates and confirmed on other seeds; see STUDY.md."""
