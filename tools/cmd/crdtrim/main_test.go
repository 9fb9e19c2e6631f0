package main

import (
	"strings"
	"testing"
)

const definition = `---
properties:
  description:
    description: ours
    type: string
  template:
    description: ours, too
    properties:
      spec:
        description: theirs
        properties:
          containers:
            description: theirs
            items:
              description: theirs
              properties:
                description:
                  description: theirs
                  type: string
              type: object
            type: array
          selector:
            additionalProperties:
              description: theirs
              type: string
            type: object
        type: object
    type: object
`

func TestTrim(t *testing.T) {
	out, err := trim([]byte(definition))
	if err != nil {
		t.Fatal(err)
	}
	text := string(out)
	if strings.Contains(text, "theirs") || strings.Count(text, "ours") != 2 || strings.Count(text, "description:\n") != 2 {
		t.Errorf("got\n%s", text)
	}
	again, err := trim(out)
	if err != nil || string(again) != text {
		t.Errorf("a second time gives %v\n%s", err, again)
	}
	const other = "# A comment stays\nproperties: {spec: {description: ours}}\n"
	if out, err := trim([]byte(other)); err != nil || string(out) != other {
		t.Errorf("without a template: %v\n%s", err, out)
	}
}
