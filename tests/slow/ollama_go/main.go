// Executes templates as Ollama does (template.Execute for a template over .Messages), with Go's own text/template:
// reads one JSON object a line, {"template", "messages", "tools", "think", "think_set"}, and writes its text as JSON.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type args map[string]any

func (a args) String() string { return encoded(a) }

type function struct {
	Name        string     `json:"name"`
	Description string     `json:"description"`
	Parameters  parameters `json:"parameters"`
}

type parameters struct {
	Type       string              `json:"type"`
	Required   []string            `json:"required,omitempty"`
	Properties map[string]property `json:"properties"`
}

type property struct {
	Type        string `json:"type,omitempty"`
	Description string `json:"description,omitempty"`
}

type tool struct {
	Type     string   `json:"type"`
	Function function `json:"function"`
}

func (t tool) String() string { return encoded(t) }

type call struct {
	Function struct {
		Name      string `json:"name"`
		Arguments args   `json:"arguments"`
	}
}

type message struct {
	Role, Content, Thinking string
	ToolCalls               []call
}

type job struct {
	Template string
	Messages []*message
	Tools    []tool
	Think    bool
	ThinkSet bool `json:"think_set"`
}

func encoded(v any) string {
	text, _ := json.Marshal(v)
	return string(text)
}

func main() {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<26)
	for lines.Scan() {
		var j job
		if err := json.Unmarshal(lines.Bytes(), &j); err != nil {
			panic(err)
		}
		var system []string
		var collated []*message
		for _, m := range j.Messages {
			if m.Role == "system" {
				system = append(system, m.Content)
			}
			if n := len(collated); n > 0 && collated[n-1].Role == m.Role && m.Role != "tool" {
				collated[n-1].Content += "\n\n" + m.Content
			} else {
				collated = append(collated, m)
			}
		}
		parsed := template.New("").Option("missingkey=zero").Funcs(template.FuncMap{"json": encoded})
		var out bytes.Buffer
		if _, err := parsed.Parse(j.Template); err != nil {
			out.WriteString("error: " + err.Error())
		} else if err := parsed.Execute(&out, map[string]any{
			"System": strings.Join(system, "\n\n"), "Messages": collated, "Tools": j.Tools, "Response": "",
			"Think": j.Think, "IsThinkSet": j.ThinkSet,
		}); err != nil {
			out.WriteString("error: " + err.Error())
		}
		os.Stdout.WriteString(encoded(out.String()) + "\n")
	}
}
