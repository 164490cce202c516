"use strict";
for (const button of document.querySelectorAll("button.copy")) {
  const code = document.getElementById(button.dataset.code);
  const said = document.getElementById("copied");
  button.hidden = false;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch (error) {
      // Without the right to write to the clipboard the code is selected, to be copied by hand.
      getSelection().selectAllChildren(code);
      if (!document.execCommand("copy")) return;
    }
    said.textContent = button.dataset.done;
    setTimeout(() => { said.textContent = ""; }, 4000);
  });
}
document.documentElement.dataset.ready = "yes";
