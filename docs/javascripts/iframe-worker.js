// Browsers start no worker for a page from the disk, and the search of this site runs in one. There, the script of a
// worker runs in a hidden frame instead; its messages take the same ways. Elsewhere this file does nothing.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      this.started = new Promise((resolve, reject) => {
        frame.onload = () => {
          const page = frame.contentWindow;
          page.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
          const script = page.document.createElement("script");
          script.src = url;
          script.onload = () => resolve(page);
          script.onerror = reject;
          page.document.head.append(script);
        };
      });
      document.body.append(frame);
    }

    async postMessage(data) {
      const page = await this.started;
      page.dispatchEvent(new page.MessageEvent("message", { data }));
    }
  };
}
